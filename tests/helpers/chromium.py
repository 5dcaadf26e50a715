"""A headless Chromium that is driven over a pipe, with the DevTools protocol."""

import json
import os
import shutil
import subprocess
import time

CHROMIUM = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)


class Browser:
    """One page of a Chromium. Records which addresses the page asks for."""

    def __init__(self, profile, width=1200, height=1000):
        read_commands, self._out = os.pipe()
        self._in, write_answers = os.pipe()
        # Chromium reads commands from the file 3 and writes answers to the file 4.
        command = f'exec "$@" 3<&{read_commands} 4>&{write_answers}'
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        options += ["--disable-background-networking", "--disable-component-update"]
        options += ["--disable-sync", "--disable-default-apps", "--remote-debugging-pipe"]
        options += [f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        self._process = subprocess.Popen(
            ["bash", "-c", command, "bash", CHROMIUM, *options],
            pass_fds=(read_commands, write_answers),
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_answers)
        self._rest, self._number, self._session = b"", 0, None
        self.asked, self.console = set(), []
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        attached = self.do("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "DOM"):
            self.do(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._process.terminate()
        self._process.wait(20)
        os.close(self._out)
        os.close(self._in)

    def do(self, method, **params):
        """Send a command; return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _read(self):
        while b"\0" not in self._rest:
            self._rest += os.read(self._in, 1 << 20)
        line, _, self._rest = self._rest.partition(b"\0")
        answer = json.loads(line)
        params = answer.get("params", {})
        if answer.get("method") == "Network.requestWillBeSent":
            self.asked.add(params["request"]["url"])
        if answer.get("method") == "Runtime.exceptionThrown":
            self.console.append(str(params["exceptionDetails"]))
        return answer

    def evaluate(self, expression):
        """The value of an expression of JavaScript."""
        result = self.do(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait_for(self, expression, seconds=60):
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            value = self.evaluate(expression)
            if value:
                return value
            time.sleep(0.2)
        raise TimeoutError(f"{expression} is {value!r}; {self.console}")

    def click(self, selector):
        """Press the mouse on an element."""
        place = self.evaluate(
            f"(() => {{ const box = document.querySelector({json.dumps(selector)})"
            ".getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2] })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            at = {"x": place[0], "y": place[1], "button": "left", "clickCount": 1}
            self.do("Input.dispatchMouseEvent", type=kind, **at)

    def choose_file(self, selector, path):
        """Choose a file in an ``input`` element."""
        root = self.do("DOM.getDocument")["root"]["nodeId"]
        node = self.do("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.do("DOM.setFileInputFiles", nodeId=node, files=[str(path)])
