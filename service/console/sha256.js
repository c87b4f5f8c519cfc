// SHA-256 (FIPS 180-4) of bytes that come in pieces. The browser's own digest takes a whole file at once, and exists
// only on pages with TLS.

const K = new Int32Array([
  0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98,
  0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786,
  0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8,
  0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13,
  0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819,
  0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a,
  0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7,
  0xc67178f2,
]);
const START = [0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19];
const BLOCK = 64;

/** A message's length in bits as two words of 32, the higher first; bytes: below 2⁵³. */
export function lengthWords(bytes) {
  // Shifting would cut a number of more than 32 bits.
  return [Math.floor(bytes / 2 ** 29) >>> 0, ((bytes % 2 ** 29) * 8) >>> 0];
}

export class Sha256 {
  constructor() {
    this.state = Int32Array.from(START);
    this.words = new Int32Array(64);
    this.rest = new Uint8Array(BLOCK);
    this.held = 0;
    this.bytes = 0;
  }

  /** Takes bytes, a Uint8Array of any length. */
  update(data) {
    this.bytes += data.length;
    let at = 0;
    if (this.held > 0) {
      at = Math.min(BLOCK - this.held, data.length);
      this.rest.set(data.subarray(0, at), this.held);
      this.held += at;
      if (this.held < BLOCK) return this;
      this.#blocks(this.rest, 0, BLOCK);
      this.held = 0;
    }
    const whole = data.length - ((data.length - at) % BLOCK);
    this.#blocks(data, at, whole);
    this.rest.set(data.subarray(whole));
    this.held = data.length - whole;
    return this;
  }

  /** The digest in hex. Takes no more bytes afterwards. */
  hex() {
    const [high, low] = lengthWords(this.bytes);
    const end = new Uint8Array(this.held < 56 ? BLOCK : 2 * BLOCK);
    end.set(this.rest.subarray(0, this.held));
    end[this.held] = 0x80;
    new DataView(end.buffer).setUint32(end.length - 8, high);
    new DataView(end.buffer).setUint32(end.length - 4, low);
    this.#blocks(end, 0, end.length);
    return [...this.state].map((word) => (word >>> 0).toString(16).padStart(8, "0")).join("");
  }

  #blocks(data, from, to) {
    const w = this.words;
    let [h0, h1, h2, h3, h4, h5, h6, h7] = this.state;
    for (let at = from; at < to; at += BLOCK) {
      for (let i = 0, j = at; i < 16; i++, j += 4) {
        w[i] = (data[j] << 24) | (data[j + 1] << 16) | (data[j + 2] << 8) | data[j + 3];
      }
      for (let i = 16; i < 64; i++) {
        const x = w[i - 15];
        const y = w[i - 2];
        const s0 = ((x >>> 7) | (x << 25)) ^ ((x >>> 18) | (x << 14)) ^ (x >>> 3);
        const s1 = ((y >>> 17) | (y << 15)) ^ ((y >>> 19) | (y << 13)) ^ (y >>> 10);
        w[i] = (w[i - 16] + s0 + w[i - 7] + s1) | 0;
      }
      let a = h0,
        b = h1,
        c = h2,
        d = h3,
        e = h4,
        f = h5,
        g = h6,
        h = h7;
      for (let i = 0; i < 64; i++) {
        const s1 = ((e >>> 6) | (e << 26)) ^ ((e >>> 11) | (e << 21)) ^ ((e >>> 25) | (e << 7));
        const t1 = (h + s1 + ((e & f) ^ (~e & g)) + K[i] + w[i]) | 0;
        const s0 = ((a >>> 2) | (a << 30)) ^ ((a >>> 13) | (a << 19)) ^ ((a >>> 22) | (a << 10));
        const t2 = (s0 + ((a & b) ^ (a & c) ^ (b & c))) | 0;
        h = g;
        g = f;
        f = e;
        e = (d + t1) | 0;
        d = c;
        c = b;
        b = a;
        a = (t1 + t2) | 0;
      }
      h0 = (h0 + a) | 0;
      h1 = (h1 + b) | 0;
      h2 = (h2 + c) | 0;
      h3 = (h3 + d) | 0;
      h4 = (h4 + e) | 0;
      h5 = (h5 + f) | 0;
      h6 = (h6 + g) | 0;
      h7 = (h7 + h) | 0;
    }
    this.state.set([h0, h1, h2, h3, h4, h5, h6, h7]);
  }
}
