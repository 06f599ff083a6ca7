"use strict";
// The page: what a person sees and touches.

const LONGEST = 2000, DEVIATION = 42, ZOOM = 6;
const KEYS = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 1], ArrowDown: [1, -1], KeyW: [2, 1], KeyS: [2, -1]};
const PAD = [["Left", 0, -1], ["Right", 0, 1], ["Forward", 1, 1], ["Back", 1, -1], ["Up", 2, 1], ["Down", 2, -1]];
const DEAD_ZONE = 0.2;
const SIMD = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11];

const at = id => document.getElementById(id);
const setup = JSON.parse(at("setup").textContent);
const engines = new Map();
const held = new Map();  // what is pressed: name → [axis, sign]
const simulator = {world: null, steps: [], position: 0, clip: 0, frame: 0, seed: 1, chance: true, busy: false, own: null};
let running = false, closed = false, gripWas = false, recorder = null, since = 0;

function tell(text, warn = false) {
  at("told").textContent = text;
  at("told").hidden = text === "";
  at("told").classList.toggle("warn", warn);
}

// --- Worlds ---

async function openWorld(number) {
  if (!engines.has(number)) {
    const entry = setup.entries[number];
    const arrays = readArrays(await readBlock(`world-${number}`));
    const [clips, frames, groups] = arrays.stoch.shape;
    const world = {...entry.about, number, mark: entry.mark, arrays, clips, frames, groups};
    const engine = setup.socket
      ? await RemoteEngine.start(setup.socket, number, world)
      : await LocalEngine.start(number, world);
    engines.set(number, {world, engine});
  }
  return engines.get(number);
}

function recordSize(world) { return {robot: world.action_dim, latent: 5, none: 0}[world.controls]; }

function actionOf(world, record) {  // the numbers that the model is fed for a step of the record
  if (world.controls === "robot") { return Float32Array.from(record, number => number / 127); }
  if (world.controls === "none") { return new Float32Array(world.action_dim); }
  const {pairs, mean, axes} = world.arrays;
  if (record[0] === 1) { return Float32Array.from(row(pairs, record[1], record[2], record[3])); }
  const action = Float32Array.from(mean.data);
  for (let k = 0; k < axes.shape[0]; k++) {
    row(axes, k).forEach((number, i) => { action[i] += number * record[1 + k] / DEVIATION; });
  }
  if (world.discrete) {
    for (let group = 0; group < action.length; group += 8) {
      const part = action.subarray(group, group + 8), best = part.indexOf(Math.max(...part));
      part.fill(0);
      part[best] = 1;
    }
  }
  return action;
}

function isRecord(world, record) {  // whether a record out of a link can be applied
  return !(world.controls === "latent" && record[0] === 1) ||
    (record[1] >= 0 && record[1] < world.clips && [2, 3].every(i => record[i] >= 0 && record[i] < world.frames));
}

const isOwn = () => simulator.clip === simulator.world.clips;  // whether it starts from a picture of one's own

function restart() {
  const {world, clip, frame, own} = simulator, {arrays} = world;
  const of = name => arrays[name] ? row(arrays[name], clip, frame) : null;
  simulator.steps = [isOwn() ? own : {
    stoch: Int32Array.from(of("stoch")), deter: Float32Array.from(of("deter")), frame: of("frames"),
    reward: of("reward")?.[0] ?? null, value: of("value")?.[0] ?? null, policy: of("policy"),
  }];
  simulator.position = 0;
  draw();
}

async function advance(record) {  // one step of imagination from where the rollout stands
  const {world, engine, steps, position, clip, seed, chance} = simulator;
  if (record === null) {
    setRunning(false);
    tell("The recording has no more actions.");
    return;
  }
  if (simulator.busy || position >= LONGEST) { setRunning(running && position < LONGEST); return; }
  simulator.busy = true;
  const began = performance.now();
  try {
    const size = world.groups * world.classes;
    const noise = chance ? gumbelNoise(seed, position + 1, size) : new Float32Array(size);
    const context = {clip, maps: isOwn() ? simulator.own.context : null};
    const made = await engine.step(steps[position], actionOf(world, record), noise, context);
    if (simulator.steps === steps) {
      steps.length = position + 1;
      steps.push({...made, record});
      simulator.position = position + 1;
    }
  } catch (error) {
    setRunning(false);
    tell(`The step failed: ${error.message ?? error}`, true);
  } finally {
    simulator.busy = false;
  }
  simulator.milliseconds = performance.now() - began;
  draw();
}

// --- Who drives ---

const whole = (number, most) => Math.max(-most, Math.min(most, Math.round(number)));

function pushed() {  // what keys, buttons and the gamepad ask of three axes, each in [-1, 1]
  const axes = [0, 0, 0];
  for (const [axis, sign] of held.values()) { axes[axis] += sign; }
  const pad = [...(navigator.getGamepads?.() ?? [])].find(Boolean);
  if (pad) {
    const stick = number => Math.abs(pad.axes[number] ?? 0) > DEAD_ZONE ? pad.axes[number] : 0;
    axes[0] += stick(0); axes[1] -= stick(1); axes[2] -= stick(3);
    const pressed = pad.buttons[0]?.pressed ?? false;
    if (pressed && !gripWas) { grip(); }
    gripWas = pressed;
  }
  return axes.map(value => Math.max(-1, Math.min(1, value)));
}

function nextRecord(axes) {  // what moves the world next; null where the recording has no further action
  const {world, steps, position, clip, frame} = simulator;
  const driver = document.querySelector("[name=driver]:checked").value;
  const time = frame + position, recorded = driver === "record" && !isOwn() && time + 1 < world.frames;
  if (driver === "record" && !recorded && !axes.some(Boolean)) { return null; }
  if (world.controls === "none") { return []; }
  if (world.controls === "latent") {
    if (recorded) { return [1, clip, time, time + 1, 0]; }
    return [0, ...sliders().map((value, k) => whole((axes[k] ? 2 * axes[k] : value) * DEVIATION, 127))];
  }
  if (recorded) { return Array.from(row(world.arrays.actions, clip, time), value => whole(127 * value, 127)); }
  if (driver === "policy") { return Array.from(steps[position].policy, value => whole(127 * value, 127)); }
  const wanted = [...axes, closed ? 1 : -1];
  return Array.from({length: world.action_dim}, (_, i) => whole(127 * (wanted[i] ?? 0), 127));
}

function sliders() {
  const found = [...at("axes").querySelectorAll("input")].map(input => Number(input.value));
  return [...found, 0, 0, 0, 0].slice(0, 4);
}

function grip() {
  closed = !closed;
  at("grip").setAttribute("aria-pressed", String(closed));
  if (!running && simulator.world.controls === "robot") { advance(nextRecord([0, 0, 0])); }
}

function setRunning(on) {
  running = on;
  at("run").textContent = on ? "Pause" : "Run";
  at("run").setAttribute("aria-pressed", String(on));
}

async function turn() {  // looks, a few times a second, whether the world is to move
  const began = performance.now();
  if (simulator.world) {
    const axes = pushed();
    if (running || axes.some(Boolean)) {
      await advance(nextRecord(axes));
      if (since) { simulator.rate = 0.9 * (simulator.rate ?? 0) + 0.1 * (1000 / Math.max(1, began - since)); }
      since = began;
    } else { since = 0; }
  }
  const pause = 1000 / Number(at("speed").value) - (performance.now() - began);
  setTimeout(turn, Math.max(0, pause));
}

// --- What is seen ---

function paint(canvas, frame) {
  const image = new ImageData(SIDE, SIDE);
  for (let i = 0, k = 0; i < frame.length; i += 3, k += 4) { image.data.set([frame[i], frame[i + 1], frame[i + 2], 255], k); }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function draw() {
  const {world, steps, position, clip, frame} = simulator, step = steps[position];
  paint(at("imagined"), step.frame);
  const last = isOwn() ? 0 : world.frames - 1, time = Math.min(frame + position, last), over = frame + position > last;
  paint(at("truth"), isOwn() ? steps[0].frame : row(world.arrays.frames, clip, time));
  at("truth").classList.toggle("over", over);
  const told = isOwn() ? "Your image, as the model sees it" : `True frame ${time} of the recording`;
  at("truth-told").textContent = over && !isOwn() ? "The recording has ended" : told;
  const number = value => value === null || value === undefined ? "–" : value.toFixed(2);
  at("step").textContent = String(position);
  at("reward").textContent = number(step.reward);
  at("sum").textContent = step.reward === null ? "–" : number(steps.slice(1, position + 1).reduce((sum, one) => sum + one.reward, 0));
  at("value").textContent = number(step.value);
  at("rate").textContent = simulator.milliseconds ? String(Math.round(1000 / simulator.milliseconds)) : "–";
  at("position").max = String(steps.length - 1);
  at("position").value = String(position);
  at("back").disabled = position === 0;
  if (recorder) { film(); }
}

// --- A start of one's own ---

async function look(source, width, height) {  // a picture or a frame of a video becomes the start, squashed as stores do
  if (!(width && height)) { throw new Error("it has no size"); }
  const canvas = Object.assign(document.createElement("canvas"), {width: SIDE, height: SIDE});
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.fillRect(0, 0, SIDE, SIDE);
  pen.drawImage(source, 0, 0, width, height, 0, 0, SIDE, SIDE);
  const picture = pen.getImageData(0, 0, SIDE, SIDE).data.filter((_, i) => i % 4 !== 3);
  const {world, engine} = simulator;
  setRunning(false);
  while (simulator.busy) { await new Promise(done => setTimeout(done, 5)); }
  simulator.busy = true;
  try {
    simulator.own = {...await engine.look(Uint8Array.from(picture)), frame: Uint8Array.from(picture)};
  } finally { simulator.busy = false; }
  if (simulator.world !== world) { return; }
  const option = at("clip").options[world.clips] ?? at("clip").appendChild(document.createElement("option"));
  Object.assign(option, {value: String(world.clips), textContent: "your image"});
  Object.assign(simulator, {clip: world.clips, frame: 0});
  at("clip").value = String(world.clips);
  at("frame").value = "0";
  restart();
  tell("");
}

async function lookAtFile(file) {
  try {
    const image = await createImageBitmap(file);
    await look(image, image.width, image.height);
  } catch (error) { tell(`${file.name}: no image that this browser can read (${error.message ?? error})`, true); }
}

function closeCamera() {
  const video = at("preview");
  for (const track of video.srcObject?.getTracks() ?? []) { track.stop(); }
  video.srcObject = null;
  video.hidden = true;
  at("camera").textContent = "Use the camera";
}

async function useCamera() {
  const video = at("preview");
  try {
    if (video.srcObject) {
      await look(video, video.videoWidth, video.videoHeight);
      closeCamera();
      return;
    }
    video.srcObject = await navigator.mediaDevices.getUserMedia({video: true});
    video.hidden = false;
    await video.play();
    at("camera").textContent = "Take the image";
  } catch (error) {
    closeCamera();
    tell(`The camera gives no image: ${error.message ?? error}`, true);
  }
}

// --- Keeping it ---

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

function saveGif() {
  const frames = simulator.steps.map(step => step.frame);
  save(encodeGif(frames, SIDE, 4, Math.max(4, Math.round(100 / Math.min(20, Number(at("speed").value))))), "rollout.gif");
}

function film() { recorder.pen.drawImage(at("imagined"), 0, 0, SIDE * ZOOM, SIDE * ZOOM); }

function recordVideo() {
  if (recorder) { recorder.media.stop(); return; }
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = SIDE * ZOOM;
  const pen = canvas.getContext("2d"), pieces = [];
  pen.imageSmoothingEnabled = false;
  const type = ["video/mp4", "video/webm"].find(name => MediaRecorder.isTypeSupported(name));
  const media = new MediaRecorder(canvas.captureStream(25), type ? {mimeType: type} : {});
  media.ondataavailable = ({data}) => pieces.push(data);
  media.onstop = () => {
    recorder = null;
    at("video").textContent = "Record a video";
    at("video").setAttribute("aria-pressed", "false");
    save(new Blob(pieces, {type: media.mimeType}), media.mimeType.includes("mp4") ? "rollout.mp4" : "rollout.webm");
  };
  recorder = {media, pen};
  at("video").textContent = "Stop and save";
  at("video").setAttribute("aria-pressed", "true");
  film();
  media.start();
}

function link() {
  const {world, steps, position, clip, frame, seed, chance} = simulator;
  const records = steps.slice(1, position + 1).map(step => step.record);
  return writeLink({model: world.number, mark: world.mark, clip, frame, seed, chance, records});
}

async function share() {
  if (isOwn()) { tell("A link cannot contain your own image; save the rollout as a GIF instead."); return; }
  location.hash = link();
  try {
    await navigator.clipboard.writeText(location.href);
    tell("The link to this rollout was copied.");
  } catch { tell("The link to this rollout is in the address bar."); }
}

async function replay(text) {
  const sizes = number => {
    const world = engines.get(number)?.world;
    return world && {clips: world.clips, frames: world.frames, record: recordSize(world), steps: LONGEST};
  };
  const number = Number(/(?:^|&)model=(\d)(?:&|$)/.exec(text)?.[1] ?? -1);
  if (setup.entries[number]?.playable) { await openWorld(number); }
  const found = readLink(text, sizes);
  if (!found || !found.records.every(record => isRecord(engines.get(found.model).world, record))) {
    tell("The link does not fit this page, so it was not replayed.", true);
    return;
  }
  await choose(found.model, found);
  for (const [place, record] of found.records.entries()) {
    await advance(record);
    if (simulator.position !== place + 1) { return; }  // it failed, and said so
  }
  const other = found.mark !== simulator.world.mark;
  tell(other ? "The link was made with another model, so its rollout differs here." : `Replayed the ${found.records.length} steps of the link.`, other);
}

// --- Setting up ---

function fill(select, labels) {
  select.replaceChildren(...labels.map((text, value) => Object.assign(document.createElement("option"), {value, textContent: text})));
}

async function choose(number, {clip = 0, frame = 0, seed = simulator.seed, chance = simulator.chance} = {}) {
  setRunning(false);
  const {world, engine} = await openWorld(number);
  while (simulator.busy) { await new Promise(done => setTimeout(done, 5)); }
  Object.assign(simulator, {world, engine, clip, frame, seed, chance});
  const names = world.labels.map((label, i) => `${i + 1}. ${label}`);
  simulator.own = null;
  fill(at("clip"), names);
  fill(at("from-clip"), names);
  at("own").hidden = !setup.entries[number].looks;
  for (const [id, value] of Object.entries({model: number, clip, frame, seed})) { at(id).value = String(value); }
  at("chance").checked = chance;
  for (const id of ["frame", "from", "to"]) { at(id).max = String(world.frames - 1); }
  for (const id of ["robot", "latent"]) { at(id).hidden = world.controls !== id; }
  at("free").hidden = world.controls !== "none";
  at("drivers").hidden = world.controls === "none";
  at("by-policy").hidden = world.controls !== "robot";
  document.querySelector("[name=driver][value=you]").checked = true;
  for (const element of document.querySelectorAll(".earns")) { element.hidden = world.stage !== "finetune"; }
  if (world.controls === "latent") { layAxes(world.arrays.axes.shape[0]); }
  restart();
}

function layAxes(count) {
  at("axes").replaceChildren(...Array.from({length: count}, (_, k) => {
    const label = document.createElement("label"), input = document.createElement("input"), shown = document.createElement("output");
    Object.assign(input, {type: "range", min: "-3", max: "3", step: "0.1", value: "0"});
    shown.textContent = "0.0";
    input.addEventListener("input", () => { shown.textContent = Number(input.value).toFixed(1); });
    label.append(`Axis ${k + 1}`, input, shown);
    return label;
  }));
}

function layPad() {
  for (const [name, axis, sign] of PAD) {
    const button = Object.assign(document.createElement("button"), {type: "button", textContent: name});
    const release = () => held.delete(name);
    button.addEventListener("pointerdown", event => {
      button.setPointerCapture?.(event.pointerId);
      held.set(name, [axis, sign]);
    });
    for (const kind of ["pointerup", "pointercancel", "lostpointercapture", "blur"]) { button.addEventListener(kind, release); }
    button.addEventListener("click", event => {  // by keyboard, or too short for a turn to see
      if (event.detail === 0 || !simulator.busy) { const axes = [0, 0, 0]; axes[axis] = sign; advance(nextRecord(axes)); }
    });
    at("pad").append(button);
  }
  const button = Object.assign(document.createElement("button"), {type: "button", id: "grip", textContent: "Grip"});
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", grip);
  at("pad").append(button);
}

function listen() {
  const bounded = id => Math.max(0, Math.min(Number(at(id).max), Math.floor(Number(at(id).value)) || 0));
  const anew = () => {
    const clip = Number(at("clip").value);
    Object.assign(simulator, {clip, frame: clip === simulator.world.clips ? 0 : bounded("frame"), seed: bounded("seed"), chance: at("chance").checked});
    for (const id of ["frame", "seed"]) { at(id).value = String(simulator[id]); }
    restart();
  };
  at("file").addEventListener("change", () => {
    const [file] = at("file").files;
    at("file").value = "";
    if (file) { lookAtFile(file); }
  });
  at("camera").hidden = !navigator.mediaDevices?.getUserMedia;
  at("camera").addEventListener("click", useCamera);
  addEventListener("dragover", event => event.preventDefault());
  addEventListener("drop", event => {
    event.preventDefault();
    const [file] = event.dataTransfer.files;
    if (file && setup.entries[simulator.world.number].looks) { lookAtFile(file); }
  });
  at("model").addEventListener("change", () => guarded(() => choose(Number(at("model").value))));
  for (const id of ["clip", "frame", "seed", "chance"]) { at(id).addEventListener("change", anew); }
  at("restart").addEventListener("click", () => { setRunning(false); restart(); });
  at("back").addEventListener("click", () => { setRunning(false); simulator.position = Math.max(0, simulator.position - 1); draw(); });
  at("once").addEventListener("click", () => { setRunning(false); advance(nextRecord(pushed())); });
  at("run").addEventListener("click", () => setRunning(!running));
  at("position").addEventListener("input", () => { setRunning(false); simulator.position = Number(at("position").value); draw(); });
  at("centre").addEventListener("click", () => layAxes(simulator.world.arrays.axes.shape[0]));
  at("borrow").addEventListener("click", () => advance([1, Number(at("from-clip").value), bounded("from"), bounded("to"), 0]));
  at("gif").addEventListener("click", saveGif);
  at("share").addEventListener("click", share);
  at("video").hidden = typeof MediaRecorder === "undefined";
  at("video").addEventListener("click", recordVideo);
  const typed = target => target.closest?.("input:not([type=radio]):not([type=checkbox]), select, textarea, a, summary");
  addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey || typed(event.target)) { return; }
    if (event.code === "Space" && !event.target.closest?.("button, input") && simulator.world.controls === "robot") {
      event.preventDefault();
      if (!event.repeat) { grip(); }
    } else if (event.code in KEYS && !(event.target.type === "radio" && event.code.startsWith("Arrow"))) {
      event.preventDefault();
      held.set(event.code, KEYS[event.code]);
    }
  });
  addEventListener("keyup", event => held.delete(event.code));
  addEventListener("blur", () => held.clear());
  addEventListener("hashchange", () => { if (location.hash.slice(1) !== link()) { guarded(() => replay(location.hash.slice(1))); } });
}

async function guarded(work) {
  try { await work(); } catch (error) { tell(`This page is damaged, or this browser cannot run it: ${error.message ?? error}`, true); }
}

function lacking() {  // what this browser needs and does not have
  if (typeof DecompressionStream === "undefined") { return "DecompressionStream"; }
  if (setup.socket) { return null; }
  if (typeof WebAssembly === "undefined") { return "WebAssembly"; }
  return WebAssembly.validate(Uint8Array.from(SIMD)) ? null : "WebAssembly SIMD";
}

async function open() {
  const playable = setup.entries.flatMap((entry, number) => entry.playable ? [number] : []);
  if (!playable.length) { tell("No model can be played here; the reasons are below.", true); return; }
  const gone = lacking();
  if (gone) { tell(`This browser lacks ${gone}, which the page needs; open it in a current one.`, true); return; }
  if (!at("block-end")) { throw new Error("its end is missing; copy or write it again"); }
  at("model").replaceChildren(...playable.map(value => Object.assign(document.createElement("option"), {value, textContent: setup.entries[value].title})));
  await choose(playable[0]);
  layPad();
  listen();
  at("stage").hidden = false;
  tell("");
  if (location.hash.length > 1) { await replay(location.hash.slice(1)); }
  turn();
}

addEventListener("DOMContentLoaded", () => guarded(open));
