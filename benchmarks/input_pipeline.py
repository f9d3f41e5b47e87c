"""Images a second of the ImageNet recipe's input, beside plain tf.data pipelines.

    python benchmarks/input_pipeline.py [--stages] [--processes=2] [--json]

All read the same JPEG files, of ImageNet's sizes, with the same number of threads, and
crop, resize, flip and batch them. Ours gives uint8 images, which the step normalizes;
tf.data's does the same, or gives normalized float32 images, as is common. They take
turns within one run, and the figures are medians over the turns.

With `--processes` so many processes do this at the same time, and images per second of
wall-clock time add up. With `--stages` the processor time of an image is printed by
stage: ours as measured around each function of the pipeline, tf.data's as what each
stage adds to a pipeline that ends before it.
"""

import argparse
import collections
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from unittest import mock

import ml_collections
import numpy as np
import photographs  # noqa: F401, registers the dataset
import tensorflow as tf
import tensorflow_datasets as tfds

from fliqs_jax.data import augmentations, pipeline
from fliqs_jax.runs import recipes

IMAGE_SIZE = 224
MEAN, STDDEV = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BUFFERED = 8  # more batches than a pipeline keeps ahead
STAGES = ('read', 'decode', 'resize', 'flip')  # and batches of what they leave
# The functions of our pipeline that are stages of it.
_FUNCTIONS = {
  'jpeg_size': 'decode',
  'decode_box': 'decode',
  'resize': 'resize',
  'random_flip': 'flip',
}


def prepare(data_dir: str, file_format: str) -> tfds.core.DatasetBuilder:
  """Returns the builder of the photographs, generated where they are not there."""
  builder = tfds.builder(
    'photographs/large', data_dir=f'{data_dir}/{file_format}', file_format=file_format
  )
  tfds.disable_progress_bar()
  builder.download_and_prepare()
  return builder


def make_config(batch_size: int, threads: int) -> ml_collections.ConfigDict:
  config = recipes.start('imagenet', name='resnet18', width=1.0)
  recipes.imagenet(config, IMAGE_SIZE, batch_size=batch_size)
  config.mode = 'train'
  config.input.num_threads = threads
  return config


def tf_data_batches(builder, batch_size, threads, normalized, last='flip'):
  """The pipeline of TensorFlow's own ImageNet examples; yields what they train on.

  Args:
    builder: of the photographs.
    batch_size: images of a batch.
    threads: that compute.
    normalized: whether images are normalized float32, else uint8.
    last: the stage that it ends after; before `resize` it yields one number an image.
  """
  stages = STAGES[: STAGES.index(last) + 1]

  def preprocess(example):
    if 'decode' not in stages:
      return tf.strings.length(example['image'])
    shape = tf.io.extract_jpeg_shape(example['image'])
    begin, size, _ = tf.image.sample_distorted_bounding_box(
        shape, tf.zeros((1, 0, 4)), area_range=(0.08, 1.0), max_attempts=10,
        aspect_ratio_range=(3 / 4, 4 / 3), use_image_if_no_bounding_boxes=True,
    )  # fmt: skip
    box = tf.concat([begin[:2], size[:2]], axis=0)
    image = tf.io.decode_and_crop_jpeg(example['image'], box, channels=3)
    if 'resize' not in stages:
      return image[0, 0, 0]
    image = tf.image.resize(image, (IMAGE_SIZE, IMAGE_SIZE))
    if 'flip' in stages:
      image = tf.image.random_flip_left_right(image)
    if normalized:
      image = (image / 255 - MEAN) / STDDEV
    else:
      image = tf.cast(tf.round(image), tf.uint8)
    return {'image': image, 'label': example['label']}

  dataset = builder.as_dataset(
    split='train', decoders={'image': tfds.decode.SkipDecoding()}
  )
  options = tf.data.Options()
  options.threading.private_threadpool_size = threads
  options.threading.max_intra_op_parallelism = 1
  return (
    dataset.shuffle(1000)
    .repeat()
    .map(preprocess, num_parallel_calls=threads)
    .batch(batch_size, drop_remainder=True)
    .prefetch(2)
    .with_options(options)
    .as_numpy_iterator()
  )


def take_turn(batches, num_batches, batch_size):
  """Returns images a second, and images per second of processor time, of one turn."""
  for _ in range(_BUFFERED):  # of which some were made between the turns
    next(batches)
  wall, cpu = time.perf_counter(), time.process_time()
  for _ in range(num_batches):
    next(batches)
  images = num_batches * batch_size
  rates = images / (time.perf_counter() - wall), images / (time.process_time() - cpu)
  _wait_for_idle_threads()
  return rates


def _wait_for_idle_threads():
  """Lets a pipeline fill its buffers, so as not to slow down the next one's turn."""
  busy = True
  while busy:
    cpu = time.process_time()
    time.sleep(0.2)
    busy = time.process_time() - cpu > 0.02


def own_stages(batches, num_batches, batch_size):
  """Returns milliseconds of a processor that an image takes in each stage of ours."""
  spent = collections.Counter()

  def timed(function, stage):
    def call(*args):
      began = time.thread_time()
      try:
        return function(*args)
      finally:
        spent[stage] += time.thread_time() - began

    return call

  with contextlib.ExitStack() as stack:
    for name, stage in _FUNCTIONS.items():
      function = timed(getattr(augmentations, name), stage)
      stack.enter_context(mock.patch.object(augmentations, name, function))
    for _ in range(_BUFFERED):
      next(batches)
    spent.clear()
    began = time.process_time()
    for _ in range(num_batches):
      next(batches)
    whole = time.process_time() - began
  spent['read'] = whole - spent.total()  # and batches, and Grain
  return {stage: 1e3 * spent[stage] / (num_batches * batch_size) for stage in STAGES}


def tf_data_stages(builder, args):
  """Returns the same of tf.data's pipeline with uint8 images."""
  times = [0.0]
  for last in STAGES:
    batches = tf_data_batches(builder, args.batch_size, args.threads, False, last)
    _, rate = take_turn(batches, args.batches, args.batch_size)
    times.append(1e3 / rate)
  return {stage: b - a for stage, a, b in zip(STAGES, times, times[1:])}


def print_stages(ours, theirs, args):
  """Prints medians of the stages of both pipelines, measured in turns."""
  config = make_config(args.batch_size, args.threads)
  batches = pipeline.train_batches(config, ours, seed=0)
  turns = [
    (own_stages(batches, args.batches, args.batch_size), tf_data_stages(theirs, args))
    for _ in range(args.rounds)
  ]
  medians = [
    {stage: np.median([turn[stage] for turn in side]) for stage in STAGES}
    for side in zip(*turns)
  ]
  print('ms of a processor for an image   fliqs_jax   tf.data, uint8')
  for stage in STAGES:
    print(f'{stage:30} {medians[0][stage]:11.3f} {medians[1][stage]:16.3f}')
  print(f'{"all":30} {sum(medians[0].values()):11.3f} {sum(medians[1].values()):16.3f}')


def in_processes(args):
  """Returns the rates of pipelines that run in several processes, added up."""
  command = [
      sys.executable, __file__, '--json', f'--data_dir={args.data_dir}',
      f'--threads={args.threads}', f'--batch_size={args.batch_size}',
      f'--batches={args.batches}', f'--rounds={args.rounds}',
  ]  # fmt: skip
  started = [
    subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for _ in range(args.processes)
  ]
  found = [json.loads(process.communicate()[0]) for process in started]
  rates = [content['images_per_second'] for content in found]
  return {
    name: [sum(r[name][0] for r in rates), np.mean([r[name][1] for r in rates])]
    for name in rates[0]
  }


def measure(ours, theirs, args):
  """Returns images a second, and of processor time, of each pipeline."""
  config = make_config(args.batch_size, args.threads)
  pipelines = {'fliqs_jax': pipeline.train_batches(config, ours, seed=0)}
  for name, normalized in (('tf.data, uint8', False), ('tf.data, float32', True)):
    pipelines[name] = tf_data_batches(theirs, args.batch_size, args.threads, normalized)
  turns = {name: [] for name in pipelines}
  for _ in range(args.rounds):
    for name, batches in pipelines.items():
      turns[name].append(take_turn(batches, args.batches, args.batch_size))
  return {name: np.median(turn, axis=0).tolist() for name, turn in turns.items()}


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--data_dir', default=f'{tempfile.gettempdir()}/photographs')
  parser.add_argument('--threads', type=int, default=os.cpu_count(), help='a process')
  parser.add_argument('--processes', type=int, default=1)
  parser.add_argument('--batch_size', type=int, default=64)
  parser.add_argument('--batches', type=int, default=24, help='a turn')
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--stages', action='store_true', help='print stages instead')
  parser.add_argument('--json', action='store_true', help='print one JSON object')
  args = parser.parse_args()

  ours = prepare(args.data_dir, 'array_record')
  theirs = prepare(args.data_dir, 'tfrecord')
  if args.stages:
    print_stages(ours, theirs, args)
    return
  rates = in_processes(args) if args.processes > 1 else measure(ours, theirs, args)
  if args.json:
    print(json.dumps({'threads': args.threads, 'images_per_second': rates}))
    return
  print(
    f'{args.processes} processes of {args.threads} threads, medians of {args.rounds} '
    f'turns, {args.batches * args.batch_size} images each; ours / theirs'
  )
  for name, rate in rates.items():
    ratios = [own / other for own, other in zip(rates['fliqs_jax'], rate)]
    print(f'{name:18} {rate[0]:7.0f} images/s ({ratios[0]:.2f})   '
          f'{rate[1]:7.0f} images/s of a core ({ratios[1]:.2f})')  # fmt: skip


if __name__ == '__main__':
  main()
