"""A trained model in use: loading, decoding token by token, sampling, text, chat sessions."""
