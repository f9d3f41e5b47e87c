"""Runs: from a config to the files that a run leaves.

config, validation, recipes   fields, what follows from them, what can be wrong
network, builders, setup      what a config names; all that a run needs, in one record
preparation                   checks before anything is written
loop, evaluation              the steps, and what they are worth
post_training, calibration    the search of given weights without a step
reconstruction                weights rounded to every format by reconstruction
smoothing                     channels scaled, and the weights that read them back
batch_norm                    its statistics under given formats
checkpoints, pretrained       variables that are saved, and started from
hugging_face                  checkpoints of other programs, started from
workdir, files, result        the files of a run
sessions                      when, how long and on what it ran
sensitivities                 what the quality loses by each format
quality_budget                the cheapest formats that lose no more than they may
targets, front                several targets of one supernet
baseline                      the uniform model beside a search
exports, latency_measurement, timing  exports of a run, and times on the device at hand
sweep, pareto, quality        several runs, and how they compare
distributed, progress         processes that stop together; what a run shows meanwhile
compilation, jax_settings     what is set of JAX while a run computes
"""
