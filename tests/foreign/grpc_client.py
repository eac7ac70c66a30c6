"""A gRPC client that shares no code with reliant: Python's grpcio, with every type learned by server reflection.

Usage: grpc_client.py HOST:PORT TOKEN   (the token comes on standard input when it is "-")
Signs in by the token, makes a chat, follows it, sends a message, and checks the stream it gets.
"""

import sys
import uuid

import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


class Api:
    def __init__(self, address: str, token: str) -> None:
        self.channel = grpc.insecure_channel(address)
        self.database = ProtoReflectionDescriptorDatabase(self.channel)
        self.pool = descriptor_pool.DescriptorPool(self.database)
        self.metadata = [("authorization", f"Bearer {token}")]

    def call(self, service: str, method: str, **fields):
        descriptor = self.pool.FindServiceByName(f"reliant.v1.{service}").FindMethodByName(method)
        request_class = message_factory.GetMessageClass(descriptor.input_type)
        response_class = message_factory.GetMessageClass(descriptor.output_type)
        kind = self.channel.unary_stream if descriptor.server_streaming else self.channel.unary_unary
        stub = kind(
            f"/reliant.v1.{service}/{method}",
            request_serializer=request_class.SerializeToString,
            response_deserializer=response_class.FromString,
        )
        return stub(request_class(**fields), metadata=self.metadata, timeout=60)


def expect(what: bool, sentence: str) -> None:
    if not what:
        sys.exit(f"foreign client: {sentence}")


def main() -> None:
    address, token = sys.argv[1], sys.argv[2]
    if token == "-":
        token = sys.stdin.readline().strip()
    api = Api(address, token)

    services = api.database.get_services()
    for wanted in ("reliant.v1.ChatService", "reliant.v1.UpdateService", "grpc.health.v1.Health"):
        expect(wanted in services, f"reflection does not list {wanted}; it lists {sorted(services)}")

    chat = api.call("ChatService", "CreateChat", title="from python", model="sim/text?tokens=40", mode=2).chat
    updates = api.call("UpdateService", "Subscribe", chats=[{"chat_id": chat.id, "after_seq": 0}])
    sent = api.call(
        "MessageService", "SendMessage", chat_id=chat.id, client_message_id=str(uuid.uuid4()), text="hello from python"
    )

    last_seq, live, final = 0, {}, None
    for update in updates:
        kind = update.WhichOneof("update")
        if kind == "event":
            expect(update.event.seq == last_seq + 1, f"event {update.event.seq} followed {last_seq}")
            last_seq = update.event.seq
            event = update.event.WhichOneof("kind")
            if event == "message_committed" and update.event.message_committed.role == 2:
                final = update.event.message_committed
            if event == "turn_changed" and update.event.turn_changed.id == sent.turn.id:
                status = update.event.turn_changed.status
                expect(status not in (6, 7), f"the turn ended with status {status}")
                if status == 5:
                    break
        elif kind == "delta":
            key = (update.delta.block.target_id, update.delta.block.block, update.delta.epoch)
            text = live.setdefault(key, bytearray())
            expect(update.delta.offset == len(text), f"a delta at {update.delta.offset} followed {len(text)} bytes")
            text.extend(update.delta.piece)
    updates.cancel()

    expect(final is not None, "no assistant message was committed")
    text = "".join(block.text.text for block in final.blocks if block.WhichOneof("block") == "text")
    expect(len(text) > 0, "the assistant's message has no text")
    streamed = b"".join(bytes(piece) for key, piece in sorted(live.items()) if key[0] == final.id)
    expect(text.encode().startswith(streamed), "the live text is not the beginning of the committed text")

    try:
        api.call("ChatService", "GetChat", chat_id=str(uuid.uuid4()))
        expect(False, "another's chat was given out")
    except grpc.RpcError as error:
        expect(error.code() == grpc.StatusCode.NOT_FOUND, f"expected NOT_FOUND, got {error.code()}")

    api.metadata = [("authorization", "Bearer nonsense")]
    try:
        api.call("ChatService", "ListChats")
        expect(False, "a wrong token was accepted")
    except grpc.RpcError as error:
        expect(error.code() == grpc.StatusCode.UNAUTHENTICATED, f"expected UNAUTHENTICATED, got {error.code()}")

    print(f"foreign client: {last_seq} events, {len(streamed)} live bytes, {len(text)} characters; all as expected")


if __name__ == "__main__":
    main()
