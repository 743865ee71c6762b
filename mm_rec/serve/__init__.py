"""An HTTP server that speaks the protocol of OpenAI: continuous batching, sessions with a memory of fixed size, a page.

gate.py       checks requests first: key, host, size and speed
schemas.py    shapes of requests and replies
app.py        routes
replies.py    replies and streams in OpenAI's shapes
engine.py     one thread that reads prompts and draws tokens for all requests together
sessions.py   conversations kept on disk between requests
"""
