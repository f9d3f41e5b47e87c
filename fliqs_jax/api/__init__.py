"""The Python interface: runs over a user's own network, data and loss.

    result = fliqs_jax.search(model, train_batches, eval_batches, num_steps=1000)
    fixed = fliqs_jax.train(model, train_batches, eval_batches, formats='int8')

The loop is that of `python -m fliqs_jax.main`, and so are the files that it leaves.

training      `search`, `search_front` and `train`
inspection    `overview` and `evaluate`
results       `Result`
own_network   `make_searchable`, and the check of a network with its batches
own_run       what a run from Python needs, and its result
arguments     fields of the config by their last names, and formats, as arguments
"""
