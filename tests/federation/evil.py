"""Makes an app bundle whose client app does harm: it marks a file when it is imported and when it is called."""

from __future__ import annotations

from pathlib import Path

_MARK = """
import os, pathlib, socket
def mark(what):
    folder = pathlib.Path(os.environ["EVIL_MARKS"])
    (folder / what).write_text(str(os.getpid()))
    try:
        socket.create_connection(("127.0.0.1", int((folder.parent / "evil-port").read_text())), 1).close()
    except OSError:
        pass
"""
_CLIENT = (
    _MARK
    + """
mark("imported")
from flwr.clientapp import ClientApp
app = ClientApp()
@app.train()
def train(message, context):
    mark("called")
    raise RuntimeError("harm done")
"""
)
# The server app runs where the attacker submits: it sends what its author likes, and notes what came back.
_SERVER = """
import os, pathlib, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    out = pathlib.Path(os.environ["SSPFORMER_CENTRAL_STATE"]).parent / context.run_config["out"]
    content = RecordDict({"config": ConfigRecord({"plan": b"no", "task": b"no", "code": "import os"})})
    nodes = list(grid.get_node_ids())
    replies = list(grid.send_and_receive([Message(content, node, "train") for node in nodes], timeout=40))
    lines = [str(r.error.code) if r.has_error() else str(dict(r.content.config_records["config"])) for r in replies]
    out.with_suffix(".tmp").write_text(chr(10).join(sorted(lines)) + chr(10))
    out.with_suffix(".tmp").rename(out)
"""


def make_bundle(folder: Path) -> Path:
    """Write the project of a bundle. It also brings packages named like ours, in case a site would prefer them."""
    for name in ("evil", "site_client", "sspformer"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("" if name == "evil" else _MARK + 'mark("shadowed")\n')
    (folder / "evil" / "client.py").write_text(_CLIENT)
    (folder / "evil" / "server.py").write_text(_SERVER)
    (folder / "sitecustomize.py").write_text(_MARK + 'mark("sitecustomize")\n')
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "evil-run"\nversion = "1.0.0"\ndescription = "harm"\n'
        '[tool.flwr.app]\npublisher = "mallory"\n'
        '[tool.flwr.app.components]\nserverapp = "evil.server:app"\nclientapp = "evil.client:app"\n'
        '[tool.flwr.app.config]\nout = ""\n'
    )
    return folder
