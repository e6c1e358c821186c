"""A router's side of published events: gaps are filled from the replay socket."""

import msgspec
import zmq

SECONDS = 20


class Subscriber:
    """What is stored elsewhere, by the events received. batch: class to decode a message as."""

    medium = "CPU"  # of per-layer caches, which have all that is stored in host memory

    def __init__(self, publisher, batch, topic=""):
        self.context = zmq.Context()
        self.live = self.context.socket(zmq.SUB)
        self.live.setsockopt(zmq.SUBSCRIBE, topic.encode())
        self.live.connect(publisher.endpoint)
        self.again = self.context.socket(zmq.DEALER)
        if publisher.replay_endpoint:
            self.again.connect(publisher.replay_endpoint)
        self.decoder = msgspec.msgpack.Decoder(batch)
        self.next, self.events, self.blocks, self.topics = 0, [], {}, set()

    def close(self):
        self.context.destroy(linger=0)

    def receive(self, seconds=SECONDS):
        """Take one live message, and what came before it and is missing; False if none comes."""
        if not self.live.poll(seconds * 1000):
            return False
        topic, number, payload = self.live.recv_multipart()
        self.topics.add(topic)
        number = int.from_bytes(number, "big")
        if number > self.next:
            self.replay(stop=number)
        if number == self.next:
            self.take(number, payload)
        return True

    def replay(self, stop=None):
        """Take all messages from the next one on, those before `stop`, out of the buffer."""
        self.again.send_multipart([b"", self.next.to_bytes(8, "big")])
        for number, payload in self.replayed():
            if stop is None or number < stop:
                self.take(number, payload)

    def replayed(self):
        """The messages of one replay, to its end."""
        while self.again.poll(SECONDS * 1000):
            empty, _, number, payload = self.again.recv_multipart()
            assert empty == b""
            if not payload:
                assert number == b"\xff" * 8
                return
            yield int.from_bytes(number, "big"), payload
        raise AssertionError("no end of the replay came")

    def follow(self, publisher, events):
        """Replay until so many events were received."""
        while len(self.events) < events:
            self.replay()

    def take(self, number, payload):
        assert number >= self.next
        self.next = number + 1
        batch = self.decoder.decode(payload)
        assert batch.data_parallel_rank is not None
        for event in batch.events:
            self.events.append(event)
            self.apply(event)

    def apply(self, event):
        """Keep the books of one event; each agrees with those before."""
        kind = type(event).__name__
        if kind == "BlockStored":
            assert len(event.token_ids) == event.block_size * len(event.block_hashes)
            assert event.extra_keys is None or len(event.extra_keys) == len(event.block_hashes)
            assert not set(event.block_hashes) & set(self.blocks)
            if event.parent_block_hash is not None:
                assert event.parent_block_hash in self.blocks
            assert event.medium == self.medium
            for place, name in enumerate(event.block_hashes):
                start = place * event.block_size
                self.blocks[name] = event.token_ids[start : start + event.block_size]
        elif kind == "BlockRemoved":
            assert event.medium == self.medium
            for name in event.block_hashes:
                del self.blocks[name]
        else:
            assert kind == "AllBlocksCleared"
            self.blocks.clear()
