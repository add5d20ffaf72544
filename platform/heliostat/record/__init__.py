"""The flight recorder: what a job says and what happens to it, on storage as it happens, so that its story can be told
after the cluster is gone.

RUN/record/events/HOST-PID.jsonl   what happened, by the process that says it
RUN/record/logs/driver/000001.log  what the job's own process printed and logged
RUN/record/logs/IP-PID/000001.log  what a worker printed
RUN/record/alive                   when the scribe last looked (Unix time)

The job's process writes its own lines and events. A second one, the scribe, copies what workers of this machine print
out of Ray's files, ships all of it to an object store, and outlives the job for as long as that takes.
"""

from heliostat.record.events import attend, say
from heliostat.record.recording import Recording, recording

__all__ = ["Recording", "attend", "recording", "say"]
