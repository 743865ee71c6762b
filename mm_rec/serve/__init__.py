"""An HTTP server that speaks the protocol of OpenAI: continuous batching, sessions with a memory of fixed size, a page.

gate.py       who may come in, and how large and how slow a request may be
schemas.py    what a request and a reply look like
app.py        routes
replies.py    from what the engine drew to replies and streams
engine.py     one thread that reads prompts and draws tokens for all streams together
sessions.py   conversations kept on disk between requests
"""
