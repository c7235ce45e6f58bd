"""The base model, its tokenizer and the shape of the adapter: one module each, because torch is slow to import."""
