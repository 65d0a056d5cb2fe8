"""A little EMO, or as much MLE, for a pretrained model: what does it change on tasks and texts?"""
