//! Updates as they go out: encoded once, shared by all viewers. A stream copies the bytes into its frame, and no more.

use bytes::{BufMut as _, Bytes};
use prost::Message as _;
use reliant_types::pb::{self, subscribe_response::Update};
use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

/// One encoded `SubscribeResponse`.
pub fn encode(update: Update) -> Bytes {
    pb::SubscribeResponse { update: Some(update) }.encode_to_vec().into()
}

/// Takes `SubscribeRequest`, gives messages that are encoded already.
#[derive(Debug, Clone, Copy, Default)]
pub struct SharedCodec;

impl Codec for SharedCodec {
    type Encode = Bytes;
    type Decode = pb::SubscribeRequest;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for SharedCodec {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

impl Decoder for SharedCodec {
    type Item = pb::SubscribeRequest;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Self::Item>, Status> {
        pb::SubscribeRequest::decode(buffer)
            .map(Some)
            .map_err(|error| Status::invalid_argument(format!("the request is not a SubscribeRequest: {error}")))
    }
}
