"""A loaded model over HTTP, in the shapes of OpenAI's and Hugging Face's APIs. Only `mm serve` imports this room."""
