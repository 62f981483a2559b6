"""The inference process: loads models on demand, queues requests and streams tokens, OpenAI-shaped.

Read app.py (routes) first, then engine.py (the life of one request), models.py (what is in memory) and generation.py
(the token loop). Start it with `python -m workers.inference`.
"""
