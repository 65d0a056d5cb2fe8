"""One base model, then the same steps of each objective on each domain: who writes best?"""
