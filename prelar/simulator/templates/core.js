"use strict";
// What of the simulator needs no page: noise, blocks of data, links, and the two engines that make a step.

const MASK = 0xffffffff, SIDE = 64;

function mix(value) {  // a hash of integers, of which the last 32 bits count, to 32 bits
  let x = value >>> 0;
  x = Math.imul(x ^ (x >>> 16), 0x7feb352d) >>> 0;
  x = Math.imul(x ^ (x >>> 15), 0x846ca68b) >>> 0;
  return (x ^ (x >>> 16)) >>> 0;
}

function gumbelNoise(seed, number, count) {  // as prelar/simulator/step.py draws it
  const noise = new Float32Array(count);
  const base = (mix(seed) + Math.imul(0x85ebca6b, mix(number))) >>> 0;
  for (let i = 0; i < count; i++) {
    const uniform = (mix((Math.imul(i, 0x9e3779b1) + base) & MASK) + 0.5) / 4294967296;
    noise[i] = -Math.log(-Math.log(uniform));
  }
  return noise;
}

async function readBlock(name) {  // the bytes of a block of the page; throws where it is damaged
  const text = document.getElementById(`block-${name}`).textContent;
  const packed = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const KINDS = {F32: Float32Array, I32: Int32Array, U8: Uint8Array};

function readArrays(bytes) {  // a safetensors file: {name: {shape, data}}
  const view = new DataView(bytes.buffer, bytes.byteOffset);
  const length = Number(view.getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
  const arrays = {};
  delete header.__metadata__;
  for (const [name, {dtype, shape, data_offsets: [begin, end]}] of Object.entries(header)) {
    arrays[name] = {shape, data: new KINDS[dtype](bytes.slice(8 + length + begin, 8 + length + end).buffer)};
  }
  return arrays;
}

function row(array, ...place) {  // the row of an array at the first numbers of its place, as a view
  let size = array.data.length, begin = 0;
  place.forEach((number, axis) => { size /= array.shape[axis]; begin += number * size; });
  return array.data.subarray(begin, begin + size);
}

// --- Engines: step(state, action, noise, context) → state, frame, reward, value, policy ---
// look(picture) → state, reward, value, policy, context; a context is {clip, maps by name}

class LocalEngine {  // the model in this page
  static async start(number, world) {
    if (!LocalEngine.runtime) {
      const script = new Blob([await readBlock("runtime")], {type: "text/javascript"});
      const address = URL.createObjectURL(script);
      const runtime = await import(address);
      URL.revokeObjectURL(address);
      runtime.env.wasm.numThreads = 1;
      runtime.env.wasm.proxy = false;
      runtime.env.wasm.wasmBinary = await readBlock("wasm");
      runtime.env.logLevel = "error";
      LocalEngine.runtime = runtime;
    }
    const engine = new LocalEngine();
    engine.session = await LocalEngine.runtime.InferenceSession.create(await readBlock(`model-${number}`));
    Object.assign(engine, {number, world});
    return engine;
  }

  read(made, stoch, deter) {
    const {reward, value, policy} = made;
    return {
      stoch: classesOf(stoch.data, this.world.classes),
      deter: Float32Array.from(deter.data),
      reward: reward ? reward.data[0] : null,
      value: value ? value.data[0] : null,
      policy: policy ? Float32Array.from(policy.data) : null,
    };
  }

  async look(picture) {
    const {Tensor, InferenceSession} = LocalEngine.runtime;
    this.looking ??= await InferenceSession.create(await readBlock(`look-${this.number}`));
    const made = await this.looking.run({frame: new Tensor("uint8", picture, [1, SIDE, SIDE, 3])});
    const maps = Object.entries(made).filter(([name]) => name.startsWith("context"));
    return {...this.read(made, made.stoch, made.deter), context: Object.fromEntries(maps)};
  }

  async step({stoch, deter}, action, noise, {clip, maps}) {
    const {Tensor} = LocalEngine.runtime, {classes, groups} = this.world;
    const given = {
      stoch: new Tensor("float32", oneHot(stoch, classes), [1, groups, classes]),
      deter: new Tensor("float32", deter, [1, deter.length]),
      action: new Tensor("float32", action, [1, action.length]),
      noise: new Tensor("float32", noise, [1, groups, classes]),
      ...maps,
    };
    for (const [name, array] of Object.entries(maps ? {} : this.world.arrays)) {
      if (name.startsWith("context")) {
        given[name] = new Tensor("float32", row(array, clip), [1, ...array.shape.slice(1)]);
      }
    }
    const feeds = Object.fromEntries(this.session.inputNames.map(name => [name, given[name]]));
    const made = await this.session.run(feeds);
    return {...this.read(made, made.next_stoch, made.next_deter), frame: Uint8Array.from(made.frame.data)};
  }
}

class RemoteEngine {  // the model in a server on this machine, asked over a WebSocket
  static async start(address, number, world) {
    const engine = new RemoteEngine();
    engine.number = number;
    engine.world = world;
    engine.socket = new WebSocket(address);
    engine.socket.binaryType = "arraybuffer";
    await new Promise((done, fail) => {
      engine.socket.onopen = done;
      engine.socket.onerror = () => fail(new Error("the server does not answer; is it still running?"));
    });
    engine.socket.onmessage = ({data}) => { engine.waiting?.done(data); };
    engine.socket.onclose = () => {
      engine.closed = true;
      engine.waiting?.fail(new Error("the server has ended; start it again and reload this page"));
    };
    return engine;
  }

  async ask(message, picture) {  // a state, and the bytes of a picture where one is to come
    if (this.closed) { throw new Error("the server has ended; start it again and reload this page"); }
    const answer = await new Promise((done, fail) => {
      this.waiting = {done, fail};
      this.socket.send(message);
    });
    const end = answer.byteLength - picture, groups = this.world.groups, size = this.world.arrays.deter.shape[2];
    const found = new Float32Array(answer, 0, end / 4), more = found.subarray(groups + size);
    return {
      stoch: Int32Array.from(found.subarray(0, groups)),
      deter: found.slice(groups, groups + size),
      frame: new Uint8Array(answer, end),
      reward: more.length ? more[0] : null,
      value: more.length ? more[1] : null,
      policy: more.length ? more.slice(2) : null,
    };
  }

  async look(picture) {
    const sent = new Uint8Array(picture.length + 1);  // a length that no step's message has
    sent.set(picture);
    return {...await this.ask(sent.buffer, 0), context: null};
  }

  async step({stoch, deter}, action, noise, {clip}) {
    const numbers = [Float32Array.from(stoch), deter, action, noise];
    const sent = new Float32Array(2 + numbers.reduce((sum, part) => sum + part.length, 0));
    sent.set([this.number, clip]);
    let place = 2;
    for (const part of numbers) { sent.set(part, place); place += part.length; }
    return this.ask(sent.buffer, 3 * SIDE * SIDE);
  }
}

function oneHot(chosen, classes) {
  const values = new Float32Array(chosen.length * classes);
  chosen.forEach((number, group) => { values[group * classes + number] = 1; });
  return values;
}

function classesOf(values, classes) {
  const chosen = new Int32Array(values.length / classes);
  for (let i = 0; i < values.length; i++) { if (values[i] > 0.5) { chosen[Math.floor(i / classes)] = i % classes; } }
  return chosen;
}

// --- Links: a rollout as text ---

function writeLink({model, mark, clip, frame, seed, chance, records}) {
  const letters = records.map(record => String.fromCharCode(...record.map(number => number & 255))).join("");
  const actions = btoa(letters).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  return String(new URLSearchParams({model, mark, clip, frame, seed, chance: Number(chance), steps: records.length, actions}));
}

function readLink(text, sizes) {  // what writeLink was given; null for what it cannot have written
  const found = new URLSearchParams(text);
  const whole = (name, most) => {
    const value = found.get(name) ?? "";
    return /^\d{1,10}$/.test(value) && Number(value) <= most ? Number(value) : null;
  };
  const size = sizes(whole("model", 9) ?? -1);
  if (!size) { return null; }
  const link = {
    model: whole("model", 9), mark: found.get("mark"), clip: whole("clip", size.clips - 1), frame: whole("frame", size.frames - 1),
    seed: whole("seed", MASK), chance: whole("chance", 1) === 1, records: [],
  };
  const steps = whole("steps", size.steps), text64 = found.get("actions") ?? "";
  if ([link.clip, link.frame, link.seed, steps].includes(null) || !/^[\w-]*$/.test(text64)) { return null; }
  let letters;
  try { letters = atob(text64.replaceAll("-", "+").replaceAll("_", "/")); } catch { return null; }
  if (letters.length !== steps * size.record) { return null; }
  for (let i = 0; i < steps; i++) {
    const part = letters.slice(i * size.record, (i + 1) * size.record);
    link.records.push(Array.from(part, letter => (letter.charCodeAt(0) << 24) >> 24));
  }
  return link;
}
