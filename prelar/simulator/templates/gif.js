"use strict";
// Frames as an animated GIF: 255 colours chosen by median cut over all frames, and LZW.

const COLOURS = 255;

function choosePalette(frames) {  // [r, g, b] for each colour, and a table from 5 bits a channel to its number
  const counts = new Map();
  for (const frame of frames) {
    for (let i = 0; i < frame.length; i += 3) {
      const key = ((frame[i] >> 3) << 10) | ((frame[i + 1] >> 3) << 5) | (frame[i + 2] >> 3);
      counts.set(key, (counts.get(key) ?? 0) + 1);
    }
  }
  const part = (key, channel) => (key >> (10 - 5 * channel)) & 31;
  const boxes = [[...counts.keys()]];
  const spread = box => [0, 1, 2].map(channel => {
    let low = 31, high = 0;
    for (const key of box) { const value = part(key, channel); low = Math.min(low, value); high = Math.max(high, value); }
    return high - low;
  });
  while (boxes.length < COLOURS) {
    const spreads = boxes.map(box => box.length > 1 ? Math.max(...spread(box)) : 0);
    const widest = spreads.indexOf(Math.max(...spreads));
    if (spreads[widest] === 0) { break; }
    const sizes = spread(boxes[widest]), channel = sizes.indexOf(Math.max(...sizes));
    const sorted = boxes[widest].sort((a, b) => part(a, channel) - part(b, channel));
    boxes.splice(widest, 1, sorted.slice(0, sorted.length >> 1), sorted.slice(sorted.length >> 1));
  }
  const palette = [], table = new Uint8Array(1 << 15);
  boxes.forEach((box, number) => {
    const weight = box.reduce((sum, key) => sum + counts.get(key), 0);
    palette.push([0, 1, 2].map(channel =>
      Math.round(box.reduce((sum, key) => sum + counts.get(key) * (part(key, channel) * 8 + 4), 0) / weight)));
    for (const key of box) { table[key] = number; }
  });
  return {palette, table};
}

function compress(pixels) {  // LZW of numbers below 256, in blocks of at most 255 bytes
  const bytes = [];
  let bits = 0, filled = 0, width = 9, next = 258, codes = new Map(), prefix = -1;
  const emit = code => {
    bits |= code << filled;
    filled += width;
    while (filled >= 8) { bytes.push(bits & 255); bits >>>= 8; filled -= 8; }
  };
  emit(256);
  for (const pixel of pixels) {
    if (prefix < 0) { prefix = pixel; continue; }
    const key = (prefix << 8) | pixel, known = codes.get(key);
    if (known !== undefined) { prefix = known; continue; }
    emit(prefix);
    codes.set(key, next++);
    if (next > 1 << width && width < 12) { width++; }
    if (next > 4095) { emit(256); codes = new Map(); next = 258; width = 9; }
    prefix = pixel;
  }
  emit(prefix);
  emit(257);
  if (filled) { bytes.push(bits & 255); }
  const blocks = [8];
  for (let i = 0; i < bytes.length; i += 255) {
    const block = bytes.slice(i, i + 255);
    blocks.push(block.length, ...block);
  }
  return [...blocks, 0];
}

function encodeGif(frames, side, zoom, hundredths) {  // frames: RGB, side × side pixels each
  const {palette, table} = choosePalette(frames), wide = side * zoom;
  const word = number => [number & 255, number >> 8];
  const parts = [[..."GIF89a"].map(letter => letter.charCodeAt(0)), word(wide), word(wide), [0xf7, 0, 0]];
  for (let i = 0; i < 256; i++) { parts.push(palette[i] ?? [0, 0, 0]); }
  parts.push([0x21, 0xff, 11], [..."NETSCAPE2.0"].map(letter => letter.charCodeAt(0)), [3, 1, 0, 0, 0]);
  for (const frame of frames) {
    const pixels = new Uint8Array(wide * wide);
    for (let y = 0; y < wide; y++) {
      for (let x = 0; x < wide; x++) {
        const i = 3 * (Math.floor(y / zoom) * side + Math.floor(x / zoom));
        pixels[y * wide + x] = table[((frame[i] >> 3) << 10) | ((frame[i + 1] >> 3) << 5) | (frame[i + 2] >> 3)];
      }
    }
    parts.push([0x21, 0xf9, 4, 0], word(hundredths), [0, 0], [0x2c, 0, 0, 0, 0], word(wide), word(wide), [0]);
    parts.push(compress(pixels));
  }
  parts.push([0x3b]);
  return new Blob(parts.map(part => Uint8Array.from(part)), {type: "image/gif"});
}
