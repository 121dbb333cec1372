"""What a run would cost, without the machines: memory, FLOPs, traffic and time, from a step on tensors without data."""
