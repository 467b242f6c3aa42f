"""Every fault that gadfly is to find, planted into a real run of seconds: what finds it, and how soon.

    python -m experiments.faults            plants each, runs clean seeds beside them, and prints the table

A fault is planted from outside: in the recipe, the data, a model folder, a checkpoint, or round an object
that a stage works with. What then finds it is the product as it is.
"""
