// Errors as a person reads them: a sentence and a code of the error table.

import { BinaryReader, WireType } from "@bufbuild/protobuf/wire";
import { Code, ConnectError } from "@connectrpc/connect";

export interface Shown {
  sentence: string;
  code: string;
  /** Asking again, with the same ids, may succeed. */
  retryable: boolean;
  /** The access token is no good any more. */
  signedOut: boolean;
}

export function shown(error: unknown): Shown {
  const cause = ConnectError.from(error);
  const reason = errorReason(cause);
  const away = cause.code === Code.Unknown && /fetch|network/i.test(cause.rawMessage);
  return {
    sentence: away ? "The server cannot be reached; trying again helps once it is back." : cause.rawMessage,
    code: reason ?? (away ? "UNAVAILABLE" : (Code[cause.code] ?? "Unknown").replace(/(?<=[a-z])(?=[A-Z])/g, "_").toUpperCase()),
    retryable: away || [Code.Unavailable, Code.ResourceExhausted, Code.DeadlineExceeded].includes(cause.code),
    signedOut: cause.code === Code.Unauthenticated,
  };
}

/** `google.rpc.ErrorInfo.reason` (field 1), read by hand: one string is not worth another schema. */
function errorReason(error: ConnectError): string | undefined {
  for (const detail of error.details) {
    if (!("type" in detail) || detail.type !== "google.rpc.ErrorInfo" || !(detail.value instanceof Uint8Array)) continue;
    try {
      const reader = new BinaryReader(detail.value);
      while (reader.pos < reader.len) {
        const [field, wireType] = reader.tag();
        if (field === 1 && wireType === WireType.LengthDelimited) return reader.string();
        reader.skip(wireType);
      }
    } catch {
      // A detail that cannot be read takes nothing from the sentence.
    }
  }
  return undefined;
}
