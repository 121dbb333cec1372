"""What a run would cost, without the machines: memory, FLOPs, traffic and time, from one step on tensors without data."""
