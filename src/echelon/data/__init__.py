"""Built-in queries and documents, in English and Chinese, for demos, tests and tuning."""
