"""A server with a scorer that obeys its documents, to be run in a process of its own.

``python tests/support/serve_fake.py SETTINGS`` with JSON: arguments of :class:`scorers.Obedient`
under ``scorer``, the folder of :func:`scorers.gated` under ``gate``, and arguments of the service,
the limits and the address.
"""

from __future__ import annotations

import json
import logging
import sys
from functools import partial

from scorers import Obedient, gated
from services import service

from echelon.scheduling.admission import AdmissionLimits
from echelon.server.auth import Access, read_keys
from echelon.server.context import ServerContext
from echelon.server.http_server import Address, run
from echelon.server.limits import ServerLimits
from echelon.server.metrics import Metrics
from echelon.server.observability import open_traces, set_up


def main(settings: dict) -> None:
    set_up("json", "info")
    metrics = Metrics()
    scorer = settings.get("scorer", {})
    opener = (
        partial(gated, settings["gate"], **scorer)
        if "gate" in settings
        else partial(Obedient, **scorer)
    )
    bounds = AdmissionLimits(**settings.get("bounds", {}))
    made = service(opener, listener=metrics, bounds=bounds, **settings.get("service", {}))

    async def launch():
        await made.start()
        return made

    keys = read_keys(settings.get("keys"), settings.get("rate"))
    limits, access = ServerLimits(**settings.get("limits", {})), Access(keys)
    traces = open_traces(None)
    server = ServerContext(launch, "fake", metrics, limits, access=access, traces=traces)
    address = Address("127.0.0.1", 0, **settings.get("address", {}))
    run(server, address, exposed=False)


if __name__ == "__main__":
    logging.captureWarnings(capture=True)
    main(json.loads(sys.argv[1]))
