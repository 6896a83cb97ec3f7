"""The SQL. Operations of one kind that commit together run as one: a few statements for hundreds of callers.

Everything here blocks and runs on the file's thread; a `sqlite3.Error` goes through.
"""

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from rejoinder.adapters.driver import Backlog, Message
from rejoinder.adapters.embedded import RECEIVE_BYTES, Options, lease_lost
from rejoinder.adapters.sqlite_file import Database
from rejoinder.adapters.sqlite_operations import AnyOperation, CountBacklog, Lease, LetGo, Publish, Receive, Settle

NO_ATTRIBUTES: Mapping[str, str] = MappingProxyType({})


def execute(database: Database, group: Sequence[AnyOperation], now: float) -> None:
    """Run `group` within an open transaction, and set the outcome of each. `now` is the wall clock."""
    publishes: list[Publish] = []
    settles: list[Settle] = []
    for operation in group:
        match operation:
            case Publish():
                publishes.append(operation)
            case Settle():
                settles.append(operation)
            case LetGo():
                _let_go(database, operation)
            case Receive() | CountBacklog():
                pass  # after everything that may make messages available
    if publishes:
        _publish(database, publishes, now)
    if settles:
        _settle(database, settles, now)
    for operation in group:
        match operation:
            case Receive():
                tidy(database, operation.queue, operation.options, now)
                operation.outcome = _receive(database, operation, now) or None  # None: it waits on
            case CountBacklog():
                tidy(database, operation.queue, operation.options, now)
                count_backlog(database, operation, now)
            case _:
                pass


def available(database: Database, queue: str, now: float) -> bool:
    """Tell whether a receive from `queue` would find something to do. Reads only."""
    query = (
        "SELECT EXISTS (SELECT 1 FROM delivery WHERE queue = :queue AND due IS NULL)"
        " OR EXISTS (SELECT 1 FROM delivery WHERE queue = :queue AND due <= :now)"
    )
    (found,) = database.connection.execute(query, {"queue": queue, "now": now}).fetchone()
    return bool(found)


def untidy(database: Database, queue: str, options: Options, now: float) -> bool:
    """Tell whether a message of `queue` has had its last attempt and is still there. Reads only."""
    query = (
        "SELECT EXISTS (SELECT 1 FROM delivery"
        " WHERE queue = :queue AND due IS NULL AND attempt > 0 AND attempt >= :most)"  # `attempt > 0`: index `retried`
        " OR EXISTS (SELECT 1 FROM delivery WHERE queue = :queue AND due <= :now AND attempt >= :most)"
    )
    if options.max_attempts is None:
        return False
    values = {"queue": queue, "now": now, "most": options.max_attempts}
    (found,) = database.connection.execute(query, values).fetchone()
    return bool(found)


def next_due(database: Database, queue: str) -> float | None:
    """Return when the next lease or delay of `queue` ends, on the wall clock; None where nothing is held."""
    query = "SELECT MIN(due) FROM delivery WHERE queue = ? AND due IS NOT NULL"
    (due,) = database.connection.execute(query, (queue,)).fetchone()
    return None if due is None else float(due)


def tidy(database: Database, queue: str, options: Options, now: float) -> None:
    """Make available what is due, and move away what has had its last attempt."""
    execute = database.connection.execute
    execute("UPDATE delivery SET due = NULL WHERE queue = ? AND due <= ?", (queue, now))
    if options.max_attempts is not None:
        execute(
            "UPDATE delivery SET queue = ?, attempt = 0"
            " WHERE queue = ? AND due IS NULL AND attempt > 0 AND attempt >= ?",
            (options.dead_letter, queue, options.max_attempts),
        )


def count_backlog(database: Database, operation: CountBacklog, now: float) -> None:
    """Count, in a transaction or not; `tidy` before where something is `untidy`."""
    query = (
        "SELECT (SELECT COUNT(*) FROM delivery WHERE queue = :queue AND due IS NULL),"
        " (SELECT COUNT(*) FROM delivery WHERE queue = :queue AND due <= :now),"
        " (SELECT COUNT(*) FROM delivery WHERE queue = :queue AND due > :now),"
        " (SELECT COUNT(*) FROM delivery WHERE queue = :dead AND due IS NULL),"
        " (SELECT COUNT(*) FROM delivery WHERE queue = :dead AND due IS NOT NULL)"
    )  # one count for each partial index
    dead_letter = operation.options.dead_letter
    values = {"queue": operation.queue, "dead": dead_letter, "now": now}
    ready, due, held, dead, dead_held = database.connection.execute(query, values).fetchone()
    operation.outcome = Backlog(ready + due, held, None if dead_letter is None else dead + dead_held)


def _publish(database: Database, group: Sequence[Publish], now: float) -> None:
    connection = database.connection
    total = sum(len(operation.rows) for operation in group)
    connection.execute("UPDATE rejoinder SET last_seq = last_seq + ?", (total,))
    (last,) = connection.execute("SELECT last_seq FROM rejoinder").fetchone()
    seq = int(last) - total
    payloads: list[tuple[int, float, str, bytes]] = []
    deliveries: list[tuple[int, str]] = []
    for operation in group:
        first = seq + 1
        for attributes, body in operation.rows:
            seq += 1
            payloads.append((seq, now, attributes, body))
            deliveries.append((seq, operation.queue))
        operation.outcome = [f"{database.file_id}-{number}" for number in range(first, seq + 1)]
    connection.executemany("INSERT INTO payload VALUES (?, ?, ?, ?)", payloads)
    connection.executemany("INSERT INTO delivery VALUES (?, ?, 0, NULL)", deliveries)


def _settle(database: Database, group: Sequence[Settle], now: float) -> None:
    """Settle all deliveries that share a fence and a purpose by one statement."""
    wanted: dict[tuple[str, int, float | None], list[int]] = {}
    for operation in group:
        for queue, attempt, seq in operation.leases:
            wanted.setdefault((queue, attempt, operation.seconds), []).append(seq)
    live: dict[tuple[str, int, float | None], set[int]] = {}
    for (queue, attempt, seconds), seqs in wanted.items():
        due = None if seconds is None else now + seconds
        live[queue, attempt, seconds] = _settle_alike(database, queue, attempt, seqs, due)
    for operation in group:
        operation.outcome = [
            None if seq in live[queue, attempt, operation.seconds] else lease_lost(f"{database.file_id}-{seq}", attempt)
            for queue, attempt, seq in operation.leases
        ]
        if operation.seconds == 0:
            for queue in {lease.queue for lease in operation.leases}:
                tidy(database, queue, operation.options, now)


# `+queue` and `+attempt` keep the planner on the primary key.
_THESE = "WHERE seq IN (SELECT value FROM json_each(?)) AND +queue = ? AND +attempt = ? RETURNING seq"
_HOLD = f"UPDATE delivery SET due = ? {_THESE}"  # noqa: S608 - a constant
_DELETE = f"DELETE FROM delivery {_THESE}"  # noqa: S608 - a constant


def _settle_alike(database: Database, queue: str, attempt: int, seqs: list[int], due: float | None) -> set[int]:
    """Ack (`due` None) or hold those of `seqs` whose latest delivery is `attempt`; return which these are."""
    fence = (json.dumps(seqs), queue, attempt)
    execute = database.connection.execute
    if due is not None:
        return {seq for (seq,) in execute(_HOLD, (due, *fence)).fetchall()}
    live = {seq for (seq,) in execute(_DELETE, fence).fetchall()}
    execute("DELETE FROM payload WHERE seq IN (SELECT value FROM json_each(?))", (json.dumps(list(live)),))
    return live


def _let_go(database: Database, operation: LetGo) -> None:
    rows = [(lease.seq, lease.queue, lease.attempt) for lease in operation.leases]
    database.connection.executemany(
        "UPDATE delivery SET due = NULL, attempt = attempt - 1 WHERE seq = ? AND +queue = ? AND +attempt = ?", rows
    )


def _receive(database: Database, operation: Receive, now: float) -> list[Message]:
    """Lease the oldest messages of a tidied queue."""
    connection = database.connection
    cursor = connection.execute(
        "SELECT seq, attempt + 1, sent_at, attributes, body FROM delivery JOIN payload USING (seq)"
        " WHERE queue = ? AND due IS NULL ORDER BY seq LIMIT ?",
        (operation.queue, operation.limit),
    )
    rows, size = [], 0
    for row in cursor:
        rows.append(row)
        size += len(row[-1])
        if size >= RECEIVE_BYTES:
            break
    cursor.close()
    if not rows:
        return []
    connection.execute(
        "UPDATE delivery SET due = ?, attempt = attempt + 1 WHERE queue = ? AND due IS NULL AND seq <= ?",
        (now + operation.options.lease, operation.queue, rows[-1][0]),
    )
    queue, file_id = operation.queue, database.file_id
    return [
        Message(
            f"{file_id}-{seq}",
            body,
            NO_ATTRIBUTES if attributes == "{}" else MappingProxyType(json.loads(attributes)),
            attempt,
            sent_at,
            Lease(queue, attempt, seq),
        )
        for seq, attempt, sent_at, attributes, body in rows
    ]
