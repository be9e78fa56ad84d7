"""A server with a scorer that does as it is told, to be run in a process of its own.

``python tests/support/serve_fake.py SETTINGS`` with JSON: what :class:`scorers.Obedient` takes
under
``scorer``, the folder of :func:`scorers.gated` under ``gate``, and what the service, the rules, the
connections and the address take.
"""

from __future__ import annotations

import json
import logging
import sys
from functools import partial

from scorers import Obedient, gated
from services import service

from echelon.scheduling.admission import AdmissionLimits
from echelon.server.auth import read_keys
from echelon.server.connection import ConnectionLimits
from echelon.server.context import ServerContext, ServerLimits
from echelon.server.http_server import Address, run
from echelon.server.metrics import Metrics
from echelon.server.observability import open_traces, set_up


def main(told: dict) -> None:
    set_up("json", "info")
    metrics = Metrics()
    scorer = told.get("scorer", {})
    opener = (
        partial(gated, told["gate"], **scorer) if "gate" in told else partial(Obedient, **scorer)
    )
    bounds = AdmissionLimits(**told.get("bounds", {}))
    made = service(opener, ears=metrics, bounds=bounds, **told.get("service", {}))

    async def launch():
        await made.start()
        return made

    keys = read_keys(told.get("keys"), told.get("rate"))
    rules = ServerLimits(
        keys=keys,
        connection=ConnectionLimits(**told.get("connection", {})),
        **told.get("limits", {}),
    )
    house = ServerContext(launch, "fake", metrics, rules, traces=open_traces(None))
    address = Address("127.0.0.1", 0, **told.get("address", {}))
    run(house, address, exposed=False)


if __name__ == "__main__":
    logging.captureWarnings(capture=True)
    main(json.loads(sys.argv[1]))
