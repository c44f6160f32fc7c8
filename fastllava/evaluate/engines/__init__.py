"""What turns prompts into answers: one module an engine, named as the word of `--engine`."""
