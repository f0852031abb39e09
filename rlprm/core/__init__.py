"""Pure maths on tensors: no Ray, no DeepSpeed, no vLLM, no transformers, no Hydra."""
