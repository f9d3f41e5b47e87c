"""Training: the task, the train state, and the compiled steps on any mesh.

task           the record of what a network is trained for
classification, language_modelling, masked_language_modelling, user_task   tasks
train_state    all that a step reads and writes
steps          search, fixed formats, statistics, evaluation
post_training  the steps of a search without training
sharding       the mesh, and how batches and states lie on it
preprocessing  what a step does to images
health         whether the numbers of a run are sound
"""
