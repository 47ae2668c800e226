"""An OpenAI-compatible server over one session, for the programs of one device or one team. Needs edgeq[server].

    schemas       what a request may say, and what it is told when it says something else
    replies       what a request is answered: documents of the API as plain values
    api_error     errors of the API, and which of edgeq's errors becomes which
    generation    models by name, running generations on an event loop, over `edgeq.runtime.batcher`
    guard         what holds for every request: key, size, time to send it, how many at once; counts them
    metrics       counts and times in Prometheus' text format
    app           the endpoints
    serving       a process that serves: socket, signals, the end

Documents follow https://platform.openai.com/docs/api-reference (chat, completions, models), as of the `openai` client in the tests.
"""

from edgeq.errors import MissingDependency

try:
    import fastapi  # noqa: F401 - asked for first, so that the error names the extra
    import uvicorn  # noqa: F401
except ImportError as err:
    raise MissingDependency(err.name or "fastapi", "server") from err
