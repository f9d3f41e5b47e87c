"""A headless Chromium that tells what a page looks like and what it complains of.

Speaks the DevTools protocol over two pipes, for which it needs no package.
"""

import base64
import json
import os
import shutil
import subprocess

EXECUTABLE = next(
  filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))),
  None,
)


class Browser:
  """One page of a headless browser. A context manager.

  Attributes:
    complaints: what the consoles of pages said, errors and warnings alone.
    requests: the addresses that pages loaded.
  """

  def __init__(self, profile):
    self.complaints, self.requests = [], []
    self._count = 0
    read_end, self._write = os.pipe()
    self._read, write_end = os.pipe()

    # Chromium reads from 3 and writes to 4.
    as_pipes = f'exec "$0" "$@" 3<&{read_end} 4>&{write_end}'
    self._process = subprocess.Popen(
      [
        'bash', '-c', as_pipes, EXECUTABLE, '--headless=new', '--no-sandbox',
        '--disable-gpu', '--disable-dev-shm-usage', '--disable-background-networking',
        '--remote-debugging-pipe', f'--user-data-dir={profile}', 'about:blank',
      ],
      pass_fds=(read_end, write_end),
      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(read_end)
    os.close(write_end)
    self._pending = b''
    target = self._call('Target.createTarget', session=None, url='about:blank')
    self._session = self._call(
      'Target.attachToTarget', session=None, targetId=target['targetId'], flatten=True
    )['sessionId']
    for domain in ('Page', 'Runtime', 'Log', 'Network'):
      self._call(f'{domain}.enable')

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._process.kill()
    self._process.wait()
    os.close(self._read)
    os.close(self._write)

  def open(self, path, width, dark=False):
    """Shows a file in a window `width` pixels wide, in the light or the dark."""
    self._call(
      'Emulation.setDeviceMetricsOverride', width=width, height=900,
      deviceScaleFactor=1, mobile=False,
    )  # fmt: skip
    scheme = {'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}
    self._call('Emulation.setEmulatedMedia', features=[scheme])
    self._loaded = False
    self._call('Page.navigate', url=f'file://{path}')
    while not self._loaded:
      self._receive()

  def evaluate(self, expression):
    """Returns the value of a JavaScript expression in the page."""
    answer = self._call(
      'Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True
    )
    if 'exceptionDetails' in answer:
      raise RuntimeError(answer['exceptionDetails']['exception']['description'])
    return answer['result'].get('value')

  def screenshot(self, path):
    """Writes a picture of the whole page."""
    data = self._call(
      'Page.captureScreenshot', format='png', captureBeyondViewport=True
    )['data']
    with open(path, 'wb') as file:
      file.write(base64.b64decode(data))

  def _call(self, method, session='page', **parameters):
    self._count += 1
    number = self._count
    message = {'id': number, 'method': method, 'params': parameters}
    if session:
      message['sessionId'] = self._session
    os.write(self._write, json.dumps(message).encode() + b'\0')
    while True:
      answer = self._receive()
      if answer.get('id') == number:
        if 'error' in answer:
          raise RuntimeError(f'{method}: {answer["error"]["message"]}')
        return answer['result']

  def _receive(self):
    while b'\0' not in self._pending:
      part = os.read(self._read, 1 << 16)
      if not part:
        raise RuntimeError('the browser has gone')
      self._pending += part
    line, _, self._pending = self._pending.partition(b'\0')
    message = json.loads(line)
    self._note(message.get('method'), message.get('params', {}))
    return message

  def _note(self, method, parameters):
    if method == 'Page.loadEventFired':
      self._loaded = True
    elif method == 'Network.requestWillBeSent':
      self.requests.append(parameters['request']['url'])
    elif method == 'Log.entryAdded':
      if parameters['entry']['level'] in ('error', 'warning'):
        self.complaints.append(parameters['entry']['text'])
    elif method == 'Runtime.exceptionThrown':
      self.complaints.append(str(parameters['exceptionDetails']))
    elif method == 'Runtime.consoleAPICalled':
      if parameters['type'] in ('error', 'warning', 'assert'):
        self.complaints.append(str(parameters['args']))
