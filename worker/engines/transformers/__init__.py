"""Models of Hugging Face transformers: the only modules that import torch. They run in the engine process."""
