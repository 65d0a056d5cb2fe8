"""What a model of a given shape has and costs: parameters, FLOPs, memory, devices' peaks."""
