"""Images a second of the ImageNet recipe's input, beside plain tf.data pipelines.

    python benchmarks/input_pipeline.py [--json]

All read the same JPEG files, of ImageNet's sizes, with the same number of threads, and
crop, resize, flip and batch them. Ours gives uint8 images, which the step normalizes;
tf.data's does the same, or gives normalized float32 images, as is common. They take
turns within one run, and the figures are medians over the turns.
"""

import argparse
import json
import os
import tempfile
import time

import ml_collections
import numpy as np
import photographs  # noqa: F401, registers the dataset
import tensorflow as tf
import tensorflow_datasets as tfds

from fliqs_jax.data import pipeline
from fliqs_jax.runs import recipes

IMAGE_SIZE = 224
MEAN, STDDEV = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BUFFERED = 8  # more batches than a pipeline keeps ahead


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


def tf_data_batches(builder, batch_size, threads, normalized):
  """The pipeline of TensorFlow's own ImageNet examples; yields what they train on."""

  def preprocess(example):
    shape = tf.io.extract_jpeg_shape(example['image'])
    begin, size, _ = tf.image.sample_distorted_bounding_box(
        shape, tf.zeros((1, 0, 4)), area_range=(0.08, 1.0), max_attempts=10,
        aspect_ratio_range=(3 / 4, 4 / 3), use_image_if_no_bounding_boxes=True,
    )  # fmt: skip
    box = tf.concat([begin[:2], size[:2]], axis=0)
    image = tf.io.decode_and_crop_jpeg(example['image'], box, channels=3)
    image = tf.image.resize(image, (IMAGE_SIZE, IMAGE_SIZE))
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


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--data_dir', default=f'{tempfile.gettempdir()}/photographs')
  parser.add_argument('--threads', type=int, default=os.cpu_count())
  parser.add_argument('--batch_size', type=int, default=64)
  parser.add_argument('--batches', type=int, default=24, help='a turn')
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--json', action='store_true', help='print one JSON object')
  args = parser.parse_args()

  config = make_config(args.batch_size, args.threads)
  ours = prepare(args.data_dir, 'array_record')
  theirs = prepare(args.data_dir, 'tfrecord')
  pipelines = {'fliqs_jax': pipeline.train_batches(config, ours, seed=0)}
  for name, normalized in (('tf.data, uint8', False), ('tf.data, float32', True)):
    pipelines[name] = tf_data_batches(theirs, args.batch_size, args.threads, normalized)
  turns = {name: [] for name in pipelines}
  for _ in range(args.rounds):
    for name, batches in pipelines.items():
      turns[name].append(take_turn(batches, args.batches, args.batch_size))
  rates = {name: np.median(turn, axis=0).tolist() for name, turn in turns.items()}
  if args.json:
    print(json.dumps({'threads': args.threads, 'images_per_second': rates}))
    return
  print(f'{args.threads} threads, medians of {args.rounds} turns, '
        f'{args.batches * args.batch_size} images each; ours / theirs')  # fmt: skip
  for name, rate in rates.items():
    ratios = [own / other for own, other in zip(rates['fliqs_jax'], rate)]
    print(f'{name:18} {rate[0]:7.0f} images/s ({ratios[0]:.2f})   '
          f'{rate[1]:7.0f} images/s of a core ({ratios[1]:.2f})')  # fmt: skip


if __name__ == '__main__':
  main()
