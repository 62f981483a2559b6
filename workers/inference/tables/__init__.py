"""Tables of chat requests: what a table is, how it reads as text, and how it becomes a table encoder's input."""
