"""The front-end's results as OpenAI's answers, whole and as events of a stream. Nothing is decided here."""
