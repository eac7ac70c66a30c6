// One growing text, fed by pieces that may come twice, overlap, come early or be missing.

const decoder = new TextDecoder();

/** Bytes of early pieces kept per text; past that they are dropped and refilled later. */
export const EARLY_MAX_BYTES = 1024 * 1024;
/** Raw output shown of one stream; a browser need not hold 64 MB. The newest bytes are kept. */
export const SHOWN_MAX_CHARS = 256 * 1024;

/** Offsets count bytes. A piece is applied when it begins at or before what is there, else it waits. */
export class GrowingText {
  #length = 0;
  #text = "";
  #cut = 0;
  #early = new Map<number, Uint8Array>();
  #earlyBytes = 0;
  // For raw output, whose pieces may split a character.
  #stream: TextDecoder | undefined;

  constructor(raw: boolean) {
    this.#stream = raw ? new TextDecoder("utf-8", { fatal: false }) : undefined;
  }

  get length(): number {
    return this.#length;
  }

  get text(): string {
    return this.#text;
  }

  /** Characters of the beginning that are no longer held. */
  get cut(): number {
    return this.#cut;
  }

  /** Pieces wait for one that is missing. */
  get hasHole(): boolean {
    return this.#early.size > 0;
  }

  /** True when the text grew. */
  add(offset: number, piece: Uint8Array): boolean {
    if (offset > this.#length) {
      this.#keep(offset, piece);
      return false;
    }
    const grew = this.#append(offset, piece);
    return this.#takeEarly() || grew;
  }

  #append(offset: number, piece: Uint8Array): boolean {
    const fresh = piece.subarray(this.#length - offset);
    if (fresh.length === 0) return false;
    this.#length += fresh.length;
    this.#text += this.#stream ? this.#stream.decode(fresh, { stream: true }) : decoder.decode(fresh);
    if (this.#stream && this.#text.length > SHOWN_MAX_CHARS) {
      this.#cut += this.#text.length - SHOWN_MAX_CHARS / 2;
      this.#text = this.#text.slice(-SHOWN_MAX_CHARS / 2);
    }
    return true;
  }

  #keep(offset: number, piece: Uint8Array): void {
    const known = this.#early.get(offset);
    if (known && known.length >= piece.length) return;
    if (this.#earlyBytes + piece.length > EARLY_MAX_BYTES) return;
    this.#earlyBytes += piece.length - (known?.length ?? 0);
    this.#early.set(offset, piece);
  }

  #takeEarly(): boolean {
    let grew = false;
    for (let again = true; again; ) {
      again = false;
      for (const [offset, piece] of this.#early) {
        if (offset > this.#length) continue;
        this.#early.delete(offset);
        this.#earlyBytes -= piece.length;
        if (this.#append(offset, piece)) again = grew = true;
      }
    }
    return grew;
  }
}
