"""An HTTP server: OpenAI's and Ollama's protocols, continuous batching, sessions with a memory of fixed size, a page.

gate.py       checks requests first: key, host, size and speed
app.py        the application: its routes, and what stands before them
service.py    what is served, and what every route asks of it
fields.py     types of fields in requests: strict, null as absence; refusals.py says in words what is wrong with them
schemas.py    shapes of OpenAI's requests and replies; replies.py makes the replies and streams
chat.py       answers to conversations; responses.py and ollama.py have them in other shapes
answer.py     carries what the engine draws to the reply of a request
engine.py     one thread that reads prompts and draws tokens for all requests together
sessions.py   conversations kept on disk between requests
"""
