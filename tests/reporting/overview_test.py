"""Overviews of networks, against published counts."""

from conftest import load_config
from rich.table import Table

from fliqs_jax.reporting import notebook, overview, terminal
from fliqs_jax.runs.config import resolve


def test_parameters_of_inference_and_those_of_training_alone():
  config = resolve(load_config('inception_v3', 'imagenet'))
  config.mode = 'train'  # fixed formats: the table has no search in it
  found = overview.describe(config, 'bf16', 'bf16')
  # Torchvision's counts without and with the auxiliary classifier.
  assert found.params == 23_834_568
  assert found.training_params == {'aux_head': 27_161_264 - 23_834_568}
  shown = repr(found)
  assert 'inception_v3: 23,834,568 parameters, ' in shown
  assert 'In training alone: aux_head, 3,326,696 parameters' in shown


def test_html_has_the_cells_of_the_table_and_escapes_them():
  table = Table()
  table.add_column('layer')
  table.add_column('MACs', justify='right')
  table.add_row('a<b>', '1,024')
  assert notebook.to_html([table], ['less < more']) == (
    '<table>\n'
    '<tr><th style="text-align: left">layer</th>'
    '<th style="text-align: right">MACs</th></tr>\n'
    '<tr><td style="text-align: left">a&lt;b&gt;</td>'
    '<td style="text-align: right">1,024</td></tr>\n'
    '</table>\n'
    '<div>less &lt; more</div>'
  )


def test_a_text_is_returned_in_a_notebook_too(monkeypatch):
  monkeypatch.setattr('rich.console._is_jupyter', lambda: True)
  table = terminal.architecture_table({'depth': 2}, {})
  assert 'depth' in terminal.to_text([table], [])
