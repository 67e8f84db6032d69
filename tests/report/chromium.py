"""A headless Chromium that a test drives by its DevTools protocol, over a pipe: no packages.

Commands and answers are JSON objects with a zero byte after each, the browser reads them from its
file 3 and writes to its file 4.
"""

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
PATH = next(filter(None, map(shutil.which, NAMES)), None)
# The browser inherits its two ends as other numbers; this moves them to 3 and 4.
START = (
    'import os, sys; r, w = (os.dup(int(x)) for x in sys.argv[1:3]);'
    'r, w = os.dup(r), os.dup(w); os.dup2(r, 3); os.dup2(w, 4);'
    'os.execv(sys.argv[3], sys.argv[3:])'
)
FLAGS = (
    *('--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage'),
    *('--hide-scrollbars', '--no-first-run', '--remote-debugging-pipe', '--disable-extensions'),
)


class Page:
    """One tab.

    Attributes:
      errors: exceptions, and messages of the console at level error or warning.
      requests: addresses that the page asked for.
    """

    def __init__(self, reads, writes):
        self._reads, self._writes, self._rest, self._number = reads, writes, b'', 0
        self._session = None
        self.errors, self.requests, self._loaded = [], [], False
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        attached = self.call('Target.attachToTarget', targetId=target, flatten=True)
        self._session = attached['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'):
            self.call(f'{domain}.enable')

    def call(self, method, **params):
        self._number += 1
        message = {'id': self._number, 'method': method, 'params': params}
        if self._session:
            message['sessionId'] = self._session
        os.write(self._writes, json.dumps(message).encode() + b'\0')
        while True:
            answer = self._next()
            if answer.get('id') == self._number:
                assert 'error' not in answer, (method, answer)
                return answer['result']
            self._event(answer)

    def _next(self, seconds=30):
        until = time.monotonic() + seconds
        while b'\0' not in self._rest:
            ready, _, _ = select.select([self._reads], [], [], until - time.monotonic())
            assert ready, 'the browser does not answer'
            part = os.read(self._reads, 1 << 20)
            assert part, 'the browser has ended'
            self._rest += part
        message, _, self._rest = self._rest.partition(b'\0')
        return json.loads(message)

    def _event(self, message):
        params = message.get('params', {})
        match message.get('method'):
            case 'Page.loadEventFired':
                self._loaded = True
            case 'Runtime.exceptionThrown':
                self.errors.append(params['exceptionDetails'])
            case 'Runtime.consoleAPICalled' if params['type'] in ('error', 'warning', 'assert'):
                self.errors.append(params)
            case 'Log.entryAdded' if params['entry']['level'] in ('error', 'warning'):
                self.errors.append(params['entry'])
            case 'Network.requestWillBeSent':
                self.requests.append(params['request']['url'])

    def open(self, path, width=1400, height=1000, scheme='light'):
        mobile = width < 600
        size = {'width': width, 'height': height, 'deviceScaleFactor': 1, 'mobile': mobile}
        self.call('Emulation.setDeviceMetricsOverride', **size)
        features = [{'name': 'prefers-color-scheme', 'value': scheme}]
        self.call('Emulation.setEmulatedMedia', features=features)
        self._loaded = False
        result = self.call('Page.navigate', url=path.absolute().as_uri())
        assert 'errorText' not in result, result
        while not self._loaded:
            self._event(self._next())
        # The figures are drawn when their size is known: a frame later.
        self('new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))')

    def __call__(self, script):
        """The value of a JavaScript expression."""
        result = self.call(
            'Runtime.evaluate', expression=script, returnByValue=True, awaitPromise=True
        )
        assert 'exceptionDetails' not in result, result
        return result['result'].get('value')

    def press(self, key):
        """A key, as from a keyboard, to what has the focus."""
        text = {'Enter': '\r', ' ': ' '}.get(key, '')
        event = {'key': key, 'code': 'Space' if key == ' ' else key}
        event['windowsVirtualKeyCode'] = {'Enter': 13, ' ': 32, 'Tab': 9}[key]
        down = 'keyDown' if text else 'rawKeyDown'
        self.call('Input.dispatchKeyEvent', type=down, **event, **({'text': text} if text else {}))
        self.call('Input.dispatchKeyEvent', type='keyUp', **event)

    def mouse(self, x, y, kind='mouseMoved'):
        self.call('Input.dispatchMouseEvent', type=kind, x=x, y=y)

    def screenshot(self):
        """A PNG of the whole page, in base 64."""
        options = {'format': 'png', 'captureBeyondViewport': True}
        return self.call('Page.captureScreenshot', **options)['data']


@contextlib.contextmanager
def page(profile):
    """A tab of a new browser, whose profile is the empty directory."""
    browser_reads, writes = os.pipe()
    reads, browser_writes = os.pipe()
    process = subprocess.Popen(
        [
            *(sys.executable, '-c', START, str(browser_reads), str(browser_writes), PATH),
            *(*FLAGS, f'--user-data-dir={profile}', 'about:blank'),
        ],
        pass_fds=(browser_reads, browser_writes),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for end in (browser_reads, browser_writes):
            os.close(end)
        yield Page(reads, writes)
    finally:
        process.terminate()
        process.wait(20)
        for end in (reads, writes):
            os.close(end)
