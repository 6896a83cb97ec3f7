"""What `join` knows of a million requests, on disk: which request has which key, and which answer.

SQLite keeps it in a private temporary file of its own, which it deletes; in memory there is only its page cache.
"""

import sqlite3
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

CACHE_KIB = 32 * 1024
"""Above this the index spills to its file: random reads from the system's own cache cost little more."""


class Kind(StrEnum):
    """What can be wrong with a line, or with what a request got."""

    MISSING = "missing"
    """A request without a response."""
    FAILED = "failed"
    """A request whose response has a status code of 400 or more."""
    DUPLICATE = "duplicate"
    """A response that says what another one to the same request says."""
    CONFLICTING = "conflicting"
    """A response that says something else than another one to the same request."""
    UNMATCHED = "unmatched"
    """A response to no request of these."""
    AMBIGUOUS = "ambiguous"
    """A request with the same key as an earlier one: nobody can say which of them a response answers."""
    MALFORMED = "malformed"
    """A line that is not a request, or not a response."""


class Answer(NamedTuple):
    """The response that a request got."""

    request: int
    """The request's line."""
    line: int
    """The response's line."""
    offset: int
    """Where that line starts in its file, in bytes."""
    status: int
    attempt: int | None = None
    """Of a stream: the attempt that is whole. Its last message is on that line."""


class Part(NamedTuple):
    """One message of a stream."""

    request: int
    """The request's line."""
    attempt: int
    place: int
    """Which message of the attempt it is, from 0."""
    line: int
    """The message's line."""
    offset: int
    """Where that line starts in its file, in bytes."""


class Progress(NamedTuple):
    """What there is of one attempt."""

    messages: int
    """So many different ones."""
    most: int
    """The largest place among them."""
    last: int | None
    """The place of its last message, if that is there."""
    status: int | None
    """That message's."""
    whole: bool
    """Whether it was taken as an answer."""


class Problem(NamedTuple):
    """One line at fault."""

    line: int
    """Of the requests for missing, failed and ambiguous; of the responses for the others; malformed: of `text`'s."""
    text: str


class Index:
    """The keys of the requests, their answers, and what was wrong."""

    def __init__(self) -> None:
        # "" is SQLite's name for a private on-disk database; nothing in it has to survive anything.
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.executescript(
            f"""
            PRAGMA journal_mode = OFF;
            PRAGMA synchronous = OFF;
            PRAGMA cache_size = -{CACHE_KIB};
            CREATE TABLE request (key BLOB PRIMARY KEY, line INTEGER NOT NULL) WITHOUT ROWID;
            CREATE TABLE answer (
                request INTEGER PRIMARY KEY, line INTEGER, offset INTEGER, status INTEGER, attempt INTEGER
            );
            CREATE TABLE part (
                request INTEGER, attempt INTEGER, place INTEGER, line INTEGER, offset INTEGER, again INTEGER,
                PRIMARY KEY (request, attempt, place)
            ) WITHOUT ROWID;
            CREATE TABLE attempt (
                request INTEGER, number INTEGER,
                messages INTEGER, most INTEGER, last INTEGER, status INTEGER, whole INTEGER,
                PRIMARY KEY (request, number)
            ) WITHOUT ROWID;
            CREATE TABLE problem (kind TEXT, line INTEGER, text TEXT, not_joined INTEGER);
            BEGIN;
            """
        )

    def close(self) -> None:
        """Delete it."""
        self._db.close()

    def add_request(self, key: bytes, line: int) -> int:
        """Note a request; return the line of the first one with its key, which is its own unless it is ambiguous."""
        if self._db.execute("INSERT OR IGNORE INTO request VALUES (?, ?)", (key, line)).rowcount:
            return line
        return self.request_of(key) or line

    def request_of(self, key: bytes) -> int | None:
        """The line of the request with this key."""
        found = self._db.execute("SELECT line FROM request WHERE key = ?", (key,)).fetchone()
        return None if found is None else int(found[0])

    def answer_to(self, request: int) -> Answer | None:
        """What the request on this line got so far."""
        found = self._db.execute("SELECT * FROM answer WHERE request = ?", (request,)).fetchone()
        return None if found is None else Answer(*found)

    def set_answer(self, answer: Answer) -> None:
        """Let this be what its request got."""
        self._db.execute("INSERT OR REPLACE INTO answer VALUES (?, ?, ?, ?, ?)", answer)

    def part_at(self, request: int, attempt: int, place: int) -> Part | None:
        """The message of an attempt that has this place."""
        query = "SELECT request, attempt, place, line, offset FROM part WHERE request = ? AND attempt = ? AND place = ?"
        found = self._db.execute(query, (request, attempt, place)).fetchone()
        return None if found is None else Part(*found)

    def parts(self, request: int, attempt: int) -> Iterator[Part]:
        """The messages of an attempt, in their order."""
        query = (
            "SELECT request, attempt, place, line, offset FROM part WHERE request = ? AND attempt = ? ORDER BY place"
        )
        return map(Part._make, self._db.execute(query, (request, attempt)))

    def progress_of(self, request: int, attempt: int) -> Progress | None:
        """What there is of an attempt."""
        query = "SELECT messages, most, last, status, whole FROM attempt WHERE request = ? AND number = ?"
        found = self._db.execute(query, (request, attempt)).fetchone()
        return None if found is None else Progress(*found)

    def add_part(self, part: Part, progress: Progress) -> None:
        """Note a message whose place is free, and with it what there is of its attempt."""
        self._db.execute("INSERT INTO part VALUES (?, ?, ?, ?, ?, 0)", part)
        row = (part.request, part.attempt, *progress)
        self._db.execute("INSERT OR REPLACE INTO attempt VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def mark_again(self, part: Part) -> None:
        """Note that a message came twice."""
        query = "UPDATE part SET again = 1 WHERE request = ? AND attempt = ? AND place = ?"
        self._db.execute(query, (part.request, part.attempt, part.place))

    def begin_anew(self, part: Part, progress: Progress, *, done: bool) -> None:
        """Forget of an attempt what did not come twice, and what cannot be beside `part`, which may be the last one."""
        own = {"request": part.request, "attempt": part.attempt}
        past = {"place": part.place, "done": done, "last": progress.last}
        self._db.execute(
            "DELETE FROM part WHERE request = :request AND attempt = :attempt"
            " AND (NOT again OR place = :place OR (:done AND place > :place) OR place IS :last)",
            own | past,
        )
        self._db.execute("UPDATE part SET again = 0 WHERE request = :request AND attempt = :attempt", own)
        self._db.execute(
            "UPDATE attempt SET last = NULL, status = NULL, (messages, most) = (SELECT count(*), ifnull(max(place), -1)"
            " FROM part WHERE request = :request AND attempt = :attempt)"
            " WHERE request = :request AND number = :attempt",
            own,
        )

    def newest_attempt(self, request: int) -> tuple[int, Progress] | None:
        """The number of the newest attempt of a request, and what there is of it."""
        found = self._db.execute("SELECT max(number) FROM attempt WHERE request = ?", (request,)).fetchone()[0]
        progress = None if found is None else self.progress_of(request, found)
        return None if progress is None else (found, progress)

    def add_problem(self, kind: Kind, problem: Problem, *, request_not_joined: bool = False) -> None:
        """Note that something is wrong; with a request, also that it takes no part in the join."""
        self._db.execute("INSERT INTO problem VALUES (?, ?, ?, ?)", (kind.value, *problem, request_not_joined))

    def answers(self) -> Iterator[Answer]:
        """All answers in the order of their requests."""
        return map(Answer._make, self._db.execute("SELECT * FROM answer ORDER BY request"))

    def failed(self) -> Iterator[Answer]:
        """The answers with a status code of 400 or more, in the order of their requests."""
        return map(Answer._make, self._db.execute("SELECT * FROM answer WHERE status >= 400 ORDER BY request"))

    def malformed_requests(self) -> Iterator[int]:
        """The lines that are no requests, in order."""
        query = "SELECT line FROM problem WHERE not_joined AND kind = ? ORDER BY rowid"
        return (line for (line,) in self._db.execute(query, (Kind.MALFORMED.value,)))

    def missing(self) -> Iterator[int]:
        """The lines of the requests without an answer, in order."""
        query = "SELECT line FROM request WHERE line NOT IN (SELECT request FROM answer) ORDER BY line"
        return (line for (line,) in self._db.execute(query))

    def problems(self, kind: Kind) -> Iterator[Problem]:
        """What was noted of this kind, in the order of the files."""
        query = "SELECT line, text FROM problem WHERE kind = ? ORDER BY rowid"
        return map(Problem._make, self._db.execute(query, (kind.value,)))
