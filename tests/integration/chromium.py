"""Headless Chromium, controlled over a pipe by its DevTools protocol: real pages, real mouse events."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any


class Chromium:
    """Chromium with one open page; use it in a `with` block."""

    def __init__(self, url: str, profile: Path, width: int = 1100, height: int = 1000) -> None:
        commands, self._send = os.pipe()
        self._receive, answers = os.pipe()
        flags = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}",
            f"--window-size={width},{height}", "--no-first-run", "about:blank",
        ]  # fmt: skip
        redirected = f'exec chromium "$@" 3<&{commands} 4>&{answers}'  # the protocol uses file descriptors 3 and 4
        with (profile.parent / "chromium.log").open("w") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", redirected, "bash", *flags], pass_fds=(commands, answers), stdout=log, stderr=log
            )
        os.close(commands)
        os.close(answers)
        self._calls, self._buffer, self._session = 0, b"", {}
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        self.call("Page.navigate", url=url)

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        os.close(self._send)
        os.close(self._receive)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._calls += 1
        request = {"id": self._calls, "method": method, "params": params} | self._session
        os.write(self._send, json.dumps(request).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                chunk = os.read(self._receive, 1 << 20)
                assert chunk, "Chromium has gone"
                self._buffer += chunk
            message, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(message)
            if answer.get("id") == self._calls:
                if "error" in answer:
                    raise RuntimeError(answer["error"]["message"])
                return answer["result"]

    def evaluate(self, script: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float) -> None:
        """Wait until `script` is true; it may fail while the page loads."""
        deadline, result = time.monotonic() + seconds, None
        while result is not True:
            try:
                result = self.evaluate(script)
            except RuntimeError as error:
                result = error
            assert result is True or time.monotonic() < deadline, f"{script} is not true, but {result}"
            time.sleep(0.2)

    def choose(self, selector: str, file: Path) -> None:
        """Choose a file in the <input type=file> that matches `selector`."""
        document = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=document, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file.absolute())])

    def mouse(self, kind: str, x: float, y: float) -> None:
        """Send a mouse event. kind: Pressed, Moved or Released; x, y: in pixels of the window."""
        self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, button="left", buttons=1, clickCount=1)

    def tap(self, x: float, y: float) -> None:
        """With a finger; x, y in pixels of the window."""
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
