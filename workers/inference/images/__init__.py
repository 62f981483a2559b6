"""Images of chat requests: from a URL that nobody vouches for to pixels, in bounded time and memory (ADR 0015)."""
