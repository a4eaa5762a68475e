"""The model that the page draws with: being opened, there, or not to be had; and the desk in front of it."""

import threading
from collections.abc import Iterator
from typing import Any

from PIL import Image

from perflow_diffusers.app.desk import Desk, Ticket, sentence
from perflow_diffusers.app.drawing import Cancelled, Drawing
from perflow_diffusers.app.opening import open_studio
from perflow_diffusers.app.settings import Settings
from perflow_diffusers.app.studio import Studio

_OPENING = "the model"  # the desk's name for the wish to open one; windows have hashes


class Room:
    """One studio for all windows. Opening, as drawing, is the desk's thread's alone.

    `status`: a sentence; `state`: "opening", "ready" or "failed".
    """

    def __init__(self, **options: Any) -> None:
        self.studio: Studio | None = None
        self.state, self.status = "opening", "Starting"
        self.number = 0  # of the models opened, so that a page sees that there is another
        self._options = options
        self._lock = threading.Lock()
        self.desk = Desk()

    def open(self, model: str, accelerator: str | None) -> Ticket:
        """Open a model beside the present one, which goes only when the new one is there."""
        with self._lock:
            self.state, self.status = "opening", f"Waiting to load {model}"

        def work(cancelled: Cancelled) -> Iterator[tuple[str, Any]]:
            try:
                studio = open_studio(model, accelerator or None, progress=self._tell, **self._options)
                studio.prepare_thread()
            except Exception as error:
                with self._lock:
                    self.state, self.status = "failed", sentence(error)
                raise
            with self._lock:
                self.studio, self.state, self.number = studio, "ready", self.number + 1
                self.status = described(studio)
            yield ("opened", studio)

        return self.desk.submit(_OPENING, work)

    def back(self) -> None:
        """Go on with the model that is there, after another could not be opened."""
        with self._lock:
            if self.studio is not None:
                self.state, self.status = "ready", described(self.studio)

    def draw(self, window: str, settings: Settings, image: Image.Image | None = None) -> Ticket:
        """The accelerated picture, then the one without the accelerator, then the states of the steps.

        Events: ("picture", Drawing), ("comparison", Drawing or None), ("states", pictures).
        """

        def work(cancelled: Cancelled) -> Iterator[tuple[str, Any]]:
            studio = self.studio
            if studio is None:
                raise ValueError(self.status)
            drawing: Drawing = studio.draw(settings, image, cancelled)
            yield ("picture", drawing)
            yield ("comparison", studio.draw_stock(settings, image, cancelled))
            yield ("states", studio.states(drawing))

        return self.desk.submit(window, work)

    def _tell(self, what: str) -> None:
        with self._lock:
            self.status = f"{what} ..."

    def close(self) -> None:
        """Interrupt what is in work."""
        self.desk.close()


def described(studio: Studio) -> str:
    """Model, accelerator and device in one line."""
    accelerator = (
        f"accelerator {studio.about['accelerator']}" if studio.accelerator else "accelerated by its own weights"
    )
    device = studio.pipe.device if not studio.offload else f"offloaded by {studio.offload}"
    dtype = str(studio.pipe.dtype).removeprefix("torch.")
    return f"{studio.about['model']} · {accelerator} · {device}, {dtype}"
