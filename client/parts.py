"""What a join has of streams whose messages are not all there yet, or were replaced by a later attempt."""

from rejoinder.client.index import Answer, Index, Part, Progress

NOTHING = Progress(messages=0, most=-1, last=None, status=None, whole=False)


class Parts:
    """Says when an attempt is whole. An attempt that never is was given up by its worker, and is nobody's answer."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def contradicts(self, part: Part, *, done: bool) -> bool:
        """Whether `part` cannot be of the same run as the others of its attempt: there would be more than a last one.

        A broker that begins to count anew, as after a move out of a dead-letter queue, brings two runs of one number.
        """
        progress = self._index.progress_of(part.request, part.attempt) or NOTHING
        if progress.last is not None:
            return done or part.place > progress.last
        return done and part.place < progress.most

    def begin_anew(self, part: Part, *, done: bool) -> None:
        """Keep of an attempt only what may also be of the run that `part` is of: what came twice."""
        progress = self._index.progress_of(part.request, part.attempt)
        if progress is not None:
            self._index.begin_anew(part, progress, done=done)

    def is_whole(self, part: Part) -> bool:
        """Whether the attempt of `part` has been taken as an answer."""
        progress = self._index.progress_of(part.request, part.attempt)
        return progress is not None and progress.whole

    def add(self, part: Part, answer: Answer, *, done: bool) -> Answer | None:
        """Add a message; return the answer that its attempt is, if this one made it whole.

        A failure needs nothing of what was said before it.

        Args:
            part: At a place that is free.
            answer: What the message would be if it were a whole response.
            done: Whether it is the last one.
        """
        before = self._index.progress_of(part.request, part.attempt) or NOTHING
        last, status = (part.place, answer.status) if done else (before.last, before.status)
        messages = before.messages + 1
        all_there = last is not None and messages == last + 1
        whole = before.whole or all_there or (done and answer.status >= 400)
        self._index.add_part(part, Progress(messages, max(before.most, part.place), last, status, whole))
        if before.whole or not whole or last is None or status is None:
            return None
        end = part if done else self._index.part_at(part.request, part.attempt, last)
        return None if end is None else Answer(part.request, end.line, end.offset, status, part.attempt)

    def missing_of(self, request: int) -> str:
        """What a request without an answer lacks, in words."""
        newest = self._index.newest_attempt(request)
        if newest is None:
            return "no response"
        number, progress = newest
        if progress.last is None:
            return f"no last message, {progress.messages} before it (attempt {number})"
        return f"{progress.messages} of {progress.last + 1} messages (attempt {number})"
