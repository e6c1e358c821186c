"""A decoder of llama architecture: model, weights, tokenizer, generation, serving."""
