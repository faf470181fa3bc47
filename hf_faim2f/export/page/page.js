// The page and, in a worker, the model: one module, so that the picture never leaves the browser's own memory.
// Resizing and post-processing are those of hf_faim2f's Predictor; each function names its counterpart there.

const MOST_PIXELS = 2 ** 26; // of a picture
const MOST_THREADS = 8;
const LEAST_DRAWN = 960; // the longer side of a small picture as it is drawn, in pixels

// ---------------------------------------------------------------- The worker: network, resizing, post-processing

let ort, session, settings, last;

/** Opens the model; returns where it runs. A GPU is tried first, unless the CPU is asked for or WebGPU is software. */
async function open(base, device) {
  settings = await (await get(new URL("page.json", base))).json();
  const model = await download(new URL(settings.model.file, base), settings.model.bytes);
  const threads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency || 1, MOST_THREADS) : 1;
  const adapter = device !== "cpu" && settings.library.webgpu && (await navigator.gpu?.requestAdapter().catch(() => null));
  const isSoftware = adapter && (adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter);
  let note = device === "gpu" && !adapter ? "This browser offers no GPU (WebGPU), so the CPU is used. " : "";
  if (adapter && (device === "gpu" || !isSoftware)) {
    try {
      await start(base, "ort.webgpu.min.mjs", threads, model, "webgpu");
      return { where: "the GPU (WebGPU)", note };
    } catch (error) {
      note = `The GPU could not run the model (${firstLine(error)}), so the CPU is used. `;
    }
  }
  await start(base, "ort.wasm.min.mjs", threads, model, "wasm");
  return { where: threads === 1 ? "the CPU, 1 thread" : `the CPU, ${threads} threads`, note };
}

async function start(base, file, threads, model, provider) {
  ort = await import(new URL(`ort/${file}`, base));
  ort.env.wasm.wasmPaths = new URL("ort/", base).href;
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  session = await ort.InferenceSession.create(model, { executionProviders: [provider], logSeverityLevel: 3 });
  const [rows, columns] = settings.model.size ?? [64, 64];
  await run(new Uint8Array(3 * rows * columns), rows, columns); // a provider may refuse an operation only when it runs
}

async function get(url) {
  let answer;
  try {
    answer = await fetch(url, { credentials: "same-origin" });
  } catch {
    throw new Error(`${nameOf(url)} cannot be loaded: open the page through a web server, and check the connection.`);
  }
  if (!answer.ok) throw new Error(`${nameOf(url)} cannot be loaded (status ${answer.status}): the page is incomplete.`);
  return answer;
}

async function download(url, bytes) {
  const reader = (await get(url)).body.getReader();
  const content = new Uint8Array(bytes);
  let place = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    if (place + value.length > bytes) throw new Error(`${nameOf(url)} is not the file of this page: export it again.`);
    content.set(value, place);
    place += value.length;
    postMessage({ kind: "progress", share: place / bytes });
  }
  if (place !== bytes) throw new Error(`${nameOf(url)} is truncated: reload the page.`);
  return content;
}

const nameOf = (url) => url.pathname.split("/").pop();
const firstLine = (error) => String(error?.message ?? error).split("\n")[0].slice(0, 200).replace(/\.$/, "");

async function run(planes, height, width) {
  const image = new ort.Tensor("uint8", planes, [1, 3, height, width]);
  const outputs = await session.run({ image });
  image.dispose?.();
  return outputs;
}

/** Segments RGBA pixels; the outputs stay, so that another threshold needs no second run. */
async function segment(rgba, height, width, threshold) {
  const started = performance.now();
  const [rows, columns] = networkSize(height, width);
  const planes = resized(rgba, height, width, rows, columns);
  const prepared = performance.now();
  const outputs = await run(planes, rows, columns);
  const computed = performance.now();
  last = { outputs, network: [rows, columns], size: [height, width] };
  for (const output of Object.values(outputs)) {
    if (output.type === "float32" && output.data.some(Number.isNaN)) {
      throw new Error("The model returns values that are not numbers: its weights, or this device, cannot be used.");
    }
  }
  const segments = answer(threshold);
  const times = { prepare: prepared - started, network: computed - prepared, finish: performance.now() - computed };
  return { segments, times, network: [rows, columns] };
}

/** `answer` of runtime/prediction.py. */
function answer(threshold) {
  const { outputs, network, size } = last;
  const make = { instance: instances, semantic, panoptic }[settings.subtask];
  return make(outputs, network, size, threshold);
}

/** `resized_size` of the image processor: (height, width) of the network's input. */
function networkSize(height, width) {
  const size = settings.resize;
  let sides = [height, width];
  if (size?.height) sides = [size.height, size.width];
  else if (size?.divisor) sides = truncated(height, width, size.shortest_edge, size.longest_edge);
  else if (size) {
    let scale = size.shortest_edge / Math.min(height, width);
    sides = height < width ? [size.shortest_edge, scale * width] : [scale * height, size.shortest_edge];
    if (size.longest_edge && Math.max(...sides) > size.longest_edge) {
      scale = size.longest_edge / Math.max(...sides);
      sides = sides.map((side) => side * scale);
    }
    sides = sides.map((side) => Math.floor(side + 0.5));
  }
  if (size?.divisor) sides = sides.map((side) => Math.ceil(side / size.divisor) * size.divisor);
  if (Math.min(...sides) < 1 || sides[0] * sides[1] > 2 ** 25) {
    throw new Error(`The picture of ${width} x ${height} pixels is too long for the model: crop it.`);
  }
  return sides;
}

/** transformers' `get_size_with_aspect_ratio`. */
function truncated(height, width, shortest, longest) {
  const [low, high] = [Math.min(height, width), Math.max(height, width)];
  let exact = shortest;
  if (longest && (high / low) * shortest > longest) exact = (longest * low) / high;
  const short = exact === shortest ? shortest : wholeNumber(exact);
  if (low === short) return [height, width];
  const long = Math.trunc((exact * high) / low);
  return width < height ? [long, short] : [short, long];
}

/** Python's `round`: of two whole numbers equally near, the even one. */
function wholeNumber(exact) {
  const low = Math.floor(exact);
  return exact - low === 0.5 ? low + (low % 2) : Math.round(exact);
}

/** `resize_image`: bilinear and antialiased, as torch and Pillow do, and rounded to bytes, (3, rows, columns). */
function resized(rgba, height, width, rows, columns) {
  const planes = new Uint8Array(3 * rows * columns);
  if (rows === height && columns === width) {
    for (let i = 0, n = rows * columns; i < n; i++) {
      for (let c = 0; c < 3; c++) planes[c * n + i] = rgba[4 * i + c];
    }
    return planes;
  }
  const [across, down] = [taps(width, columns), taps(height, rows)];
  const narrow = new Float32Array(height * columns * 3);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < columns; x++) {
      const { first, weights } = across[x];
      let red = 0, green = 0, blue = 0;
      for (let k = 0, i = 4 * (y * width + first); k < weights.length; k++, i += 4) {
        red += weights[k] * rgba[i];
        green += weights[k] * rgba[i + 1];
        blue += weights[k] * rgba[i + 2];
      }
      const place = 3 * (y * columns + x);
      narrow[place] = red;
      narrow[place + 1] = green;
      narrow[place + 2] = blue;
    }
  }
  for (let y = 0; y < rows; y++) {
    const { first, weights } = down[y];
    for (let x = 0; x < columns; x++) {
      for (let c = 0; c < 3; c++) {
        let value = 0;
        for (let k = 0; k < weights.length; k++) value += weights[k] * narrow[3 * ((first + k) * columns + x) + c];
        planes[(c * rows + y) * columns + x] = halfToEven(value);
      }
    }
  }
  return planes;
}

function halfToEven(value) {
  const near = Math.round(value);
  return Math.min(255, Math.max(0, near - value === 0.5 && near % 2 ? near - 1 : near));
}

/** For each target position, the first source position and the weights of a triangle filter. */
function taps(from, to) {
  const scale = from / to, width = Math.max(scale, 1);
  return Array.from({ length: to }, (_, i) => {
    const center = scale * (i + 0.5);
    const first = Math.max(Math.trunc(center - width + 0.5), 0);
    const end = Math.min(Math.trunc(center + width + 0.5), from);
    const weights = Array.from({ length: end - first }, (_, j) => Math.max(0, 1 - Math.abs((j + first - center + 0.5) / width)));
    const sum = weights.reduce((a, b) => a + b);
    return { first, weights: Float32Array.from(weights, (weight) => weight / sum) };
  });
}

/** `bilinear_axis`: two source positions of each target position, and the weight of the second. */
function axis(from, to) {
  const scale = Math.fround(Math.fround(from) / Math.fround(to));
  const low = new Int32Array(to), high = new Int32Array(to), weight = new Float32Array(to);
  for (let i = 0; i < to; i++) {
    const position = Math.max(0, Math.fround((i + 0.5) * scale - 0.5));
    low[i] = Math.min(Math.trunc(position), Math.max(0, from - 2));
    high[i] = Math.min(low[i] + 1, from - 1);
    weight[i] = Math.min(1, Math.max(0, position - low[i]));
  }
  return { low, high, weight };
}

/** `_nearest_indices`: source positions at pixel centers, accumulated as Pillow does. */
function nearest(from, to) {
  const step = from / to;
  let position = step / 2;
  return Int32Array.from({ length: to }, (_, i) => Math.min(Math.floor(i ? (position += step) : position), from - 1));
}

/** `_instances`: those above the threshold, with masks enlarged as by `MaskEnlargement`. */
function instances({ class_ids, scores, masks }, [rows, columns], [height, width], threshold) {
  const [down, across] = [axis(rows, height), axis(columns, width)];
  for (const one of [down, across]) {
    // A neighbor of weight 0 is left out by reading the other one twice.
    one.first = one.low.map((low, i) => (one.weight[i] < 1 ? low : one.high[i]));
    one.second = one.high.map((high, i) => (one.weight[i] > 0 ? high : one.low[i]));
  }
  const found = [];
  for (let k = 0; k < scores.data.length; k++) {
    const score = scores.data[k];
    if (threshold > 0 && !(score > threshold)) continue;
    const mask = masks.data.subarray(k * rows * columns, (k + 1) * rows * columns);
    const whole = new Uint8Array(height * width);
    for (let y = 0; y < height; y++) {
      const [upper, lower] = [down.first[y] * columns, down.second[y] * columns];
      for (let x = 0; x < width; x++) {
        const [a, b] = [across.first[x], across.second[x]];
        whole[y * width + x] = mask[upper + a] | mask[upper + b] | mask[lower + a] | mask[lower + b];
      }
    }
    const cut = cropped(whole, 1, height, width);
    if (settings.filter_empty_masks && (score === 0 || !cut.area || mask.reduce((a, b) => a + b, 0) <= 1)) continue;
    found.push({ class_id: Number(class_ids.data[k]), score, ...cut });
  }
  return bestFirst(found);
}

/** The label map by nearest neighbor, and a segment for each class in it. */
function semantic({ segmentation }, [rows, columns], [height, width]) {
  const [down, across] = [nearest(rows, height), nearest(columns, width)];
  const map = new Int32Array(height * width), seen = new Set();
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) map[y * width + x] = Number(segmentation.data[down[y] * columns + across[x]]);
  }
  map.forEach((class_id) => seen.add(class_id));
  return [...seen].sort((a, b) => a - b).map((class_id) => ({ class_id, score: null, ...cropped(map, class_id, height, width) }));
}

/** `post_process_panoptic_segmentation` of one image, with unique ids for fused classes. */
function panoptic(outputs, _, [height, width], threshold) {
  const { sigmoid, intermediate_size, mask_threshold, overlap, fuse } = settings.panoptic;
  const classes = outputs.class_queries_logits, logits = outputs.masks_queries_logits;
  const [queries, columns] = classes.dims.slice(1), [h, w] = logits.dims.slice(2);
  const kept = [];
  for (let q = 0; q < queries; q++) {
    const best = bestClass(classes.data.subarray(q * columns, (q + 1) * columns), sigmoid);
    if (best.label !== columns - 1 && best.score > threshold) kept.push({ ...best, query: q });
  }
  const [mh, mw] = intermediate_size ?? [h, w];
  const weighed = kept.map(({ query, score }) => {
    const middle = bilinear(logits.data.subarray(query * h * w, (query + 1) * h * w), h, w, mh, mw);
    return middle.map((value) => score / (1 + Math.exp(-value)));
  });
  const winners = new Int16Array(height * width).fill(-1), best = new Float32Array(height * width).fill(-1);
  weighed.forEach((middle, k) => {
    const values = bilinear(middle, mh, mw, height, width);
    kept[k].area = 0;
    for (let i = 0; i < values.length; i++) {
      if (values[i] >= mask_threshold) kept[k].area++;
      if (values[i] > best[i]) {
        best[i] = values[i];
        winners[i] = k;
      }
    }
  });
  const won = new Uint32Array(kept.length);
  winners.forEach((k) => { if (k >= 0) won[k]++; });
  const segments = [], of = new Int32Array(kept.length).fill(-1), fused = new Map();
  kept.forEach(({ label, score, area }, k) => {
    if (!(won[k] > 0 && area > 0 && won[k] / area > overlap)) return;
    score = Math.round(score * 1e6) / 1e6;
    if (fused.has(label)) {
      of[k] = fused.get(label);
      segments[of[k]].score = Math.max(segments[of[k]].score, score);
      return;
    }
    of[k] = segments.length;
    if (fuse.includes(label)) fused.set(label, of[k]);
    segments.push({ class_id: label, score });
  });
  const map = Int32Array.from(winners, (k) => (k < 0 ? -1 : of[k]));
  return bestFirst(segments.map((one, place) => ({ ...one, ...cropped(map, place, height, width) })));
}

function bestClass(logits, sigmoid) {
  let label = 0, sum = 0;
  const end = sigmoid ? logits.length - 1 : logits.length;
  for (let c = 1; c < end; c++) if (logits[c] > logits[label]) label = c;
  if (sigmoid) return { label, score: 1 / (1 + Math.exp(-logits[label])) };
  for (let c = 0; c < end; c++) sum += Math.exp(logits[c] - logits[label]);
  return { label, score: 1 / sum };
}

function bilinear(values, h, w, height, width) {
  if (h === height && w === width) return values.slice();
  const [down, across] = [axis(h, height), axis(w, width)];
  const result = new Float32Array(height * width), row = new Float32Array(w);
  for (let y = 0; y < height; y++) {
    const [upper, lower, share] = [down.low[y] * w, down.high[y] * w, down.weight[y]];
    for (let x = 0; x < w; x++) row[x] = (1 - share) * values[upper + x] + share * values[lower + x];
    for (let x = 0; x < width; x++) {
      const part = across.weight[x];
      result[y * width + x] = (1 - part) * row[across.low[x]] + part * row[across.high[x]];
    }
  }
  return result;
}

/** The pixels of a map with this value: box (inclusive), mask inside it, and number of pixels. */
function cropped(map, value, height, width) {
  let [left, top, right, bottom, area] = [width, height, -1, -1, 0];
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      if (map[i] !== value) continue;
      area++;
      if (x < left) left = x;
      if (x > right) right = x;
      if (y < top) top = y;
      bottom = y;
    }
  }
  if (!area) return { box: [0, 0, 0, 0], mask: new Uint8Array(1), area };
  const across = right - left + 1, mask = new Uint8Array(across * (bottom - top + 1));
  for (let y = top; y <= bottom; y++) {
    for (let x = left; x <= right; x++) mask[(y - top) * across + x - left] = map[y * width + x] === value ? 1 : 0;
  }
  return { box: [left, top, right, bottom], mask, area };
}

const bestFirst = (segments) => segments.sort((a, b) => b.score - a.score);

let queue = Promise.resolve();

/** Serves messages one after another: a session runs one picture at a time. */
function serve(event) {
  queue = queue.then(() => serveOne(event));
}

async function serveOne({ data }) {
  const { id, kind } = data;
  try {
    let reply;
    if (kind === "open") reply = await open(new URL(data.base), data.device);
    if (kind === "segment") reply = await segment(data.rgba, data.height, data.width, data.threshold);
    if (kind === "threshold") reply = { segments: answer(data.threshold) };
    postMessage({ id, ...reply }, (reply.segments ?? []).map(({ mask }) => mask.buffer));
  } catch (error) {
    postMessage({ id, error: firstLine(error) });
  }
}

// ---------------------------------------------------------------- The page

const $ = (name) => document.getElementById(name);
const state = { page: null, picture: null, result: null, chosen: -1, camera: null, turn: 0, worker: null, waiting: new Map() };
let count = 0;

/** Asks the worker, which serves one thing at a time. */
function ask(message, transfer = []) {
  const id = ++count;
  return new Promise((resolve, reject) => {
    state.waiting.set(id, { resolve, reject });
    state.worker.postMessage({ id, ...message }, transfer);
  });
}

async function openModel() {
  state.worker?.terminate();
  // Whoever waits for the old worker is not told, because the new one takes over.
  state.waiting.forEach(({ reject }) => reject(Object.assign(new Error("The model was opened anew."), { superseded: true })));
  state.waiting.clear();
  // As a blob it inherits the page's Content-Security-Policy, which a worker of an address does not.
  const source = new Blob([`import ${JSON.stringify(import.meta.url)};`], { type: "text/javascript" });
  state.worker = new Worker(URL.createObjectURL(source), { type: "module" });
  state.worker.onerror = (event) => {
    const text = `The model's worker failed (${event.message || "it could not start"}): reload the page.`;
    state.waiting.forEach(({ reject }) => reject(new Error(text)));
    state.waiting.clear();
  };
  state.worker.onmessage = ({ data }) => {
    if (data.kind === "progress") return busy(`Loading the model, ${Math.round(100 * data.share)} %`);
    const { resolve, reject } = state.waiting.get(data.id) ?? {};
    state.waiting.delete(data.id);
    data.error ? reject?.(new Error(data.error)) : resolve?.(data);
  };
  busy("Loading the model");
  const started = performance.now();
  const base = new URL(".", import.meta.url).href;
  const { where, note } = await ask({ kind: "open", base, device: $("device").value });
  state.where = where;
  say(`${note}Ready on ${where}, loaded in ${seconds(performance.now() - started)}.`);
}

function busy(text) {
  $("busy").hidden = !text;
  if (text) $("busy-text").textContent = text;
}

const say = (text) => { $("status").textContent = text; };
const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

function fail(error) {
  if (error?.superseded) return;
  busy("");
  const text = String(error?.message ?? error);
  $("error").textContent = /[.!?]$/.test(text) ? text : `${text}.`;
  $("error").hidden = false;
}

/** Shows a picture, a blob or the promise of one, and segments it when the model is there. */
async function take(blob, name) {
  stopCamera();
  const turn = ++state.turn; // another picture or the camera may be chosen before this one is decoded
  $("error").hidden = true;
  let bitmap;
  try {
    // As Predictor: upright by EXIF, and without color management.
    bitmap = await createImageBitmap(await blob, { imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch (error) {
    const text = `${name} cannot be decoded as a picture: choose a JPEG, PNG or WebP file.`;
    return turn === state.turn ? fail(error instanceof DOMException ? text : error) : undefined;
  }
  if (turn !== state.turn) return bitmap.close();
  if (bitmap.width * bitmap.height > MOST_PIXELS) {
    return fail(`${name} has ${bitmap.width} x ${bitmap.height} pixels, and the page takes up to 67 million: make it smaller.`);
  }
  await segmentBitmap(bitmap, name);
}

/** RGBA pixels, and what to say of them. A canvas drops the colors of transparent pixels, which `load_images` reads. */
function pixelsOf(bitmap) {
  const { width, height } = bitmap;
  let data;
  try {
    const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    context.drawImage(bitmap, 0, 0);
    ({ data } = context.getImageData(0, 0, width, height));
  } catch {
    throw new Error(`This browser has no canvas of ${width} x ${height} pixels: choose a smaller picture.`);
  }
  let first = 3;
  while (data[first] === 255) first += 4;
  if (first >= data.length) return [data, ""];
  const gl = new OffscreenCanvas(1, 1).getContext("webgl");
  if (gl && Math.max(width, height) <= gl.getParameter(gl.MAX_TEXTURE_SIZE)) {
    const pixels = new Uint8Array(data.length);
    gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
    gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
    gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, gl.getParameter(gl.TEXTURE_BINDING_2D), 0);
    gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, pixels);
    const isRead = !gl.getError();
    gl.getExtension("WEBGL_lose_context")?.loseContext();
    if (isRead) return [pixels, ""];
  }
  return [data, "The picture is partly transparent, and this browser gives such pixels other colors than the file has. "];
}

async function segmentBitmap(bitmap, name, live = false) {
  const { width, height } = bitmap, turn = state.turn;
  const picture = { name, width, height, bitmap };
  try {
    if (!live) show(picture, null);
    const [rgba, note] = pixelsOf(bitmap);
    await state.ready;
    if (!live) busy("Segmenting");
    const started = performance.now();
    const threshold = Number($("threshold").value);
    const reply = await ask({ kind: "segment", rgba, width, height, threshold }, [rgba.buffer]);
    // Another picture was chosen meanwhile. (The last frame of a camera that was stopped is shown.)
    if (live ? turn !== state.turn : state.picture !== picture) return live ? bitmap.close() : undefined;
    const total = performance.now() - started;
    show(picture, reply);
    const { prepare, network, finish } = reply.times;
    say(`${note}Segmented in ${seconds(total)} on ${state.where}: resizing ${seconds(prepare)}, network ${seconds(network)} at ` +
      `${reply.network[1]} x ${reply.network[0]}, masks ${seconds(finish)}.`);
    if (!state.camera && Number($("threshold").value) !== threshold) await another(); // it was moved meanwhile
  } catch (error) {
    if (live ? turn === state.turn : state.picture === picture) fail(error);
  } finally {
    if (!live && state.picture === picture) busy("");
  }
}

function show(picture, result) {
  if (state.picture && state.picture.bitmap !== picture.bitmap) state.picture.bitmap.close();
  [state.picture, state.result, state.chosen] = [picture, result, -1];
  $("invitation").hidden = true;
  $("canvas").hidden = false;
  $("stage").dataset.segmented = result ? picture.name : "";
  for (const name of ["save-picture", "save-json"]) $(name).disabled = !result;
  draw();
  legend();
}

/** `class_color` of runtime/drawing.py: a golden step on the hue circle for each class. */
function color(class_id) {
  const hue = (0.94 + class_id * 0.61803398875) % 1, value = class_id % 2 ? 0.75 : 1, six = hue * 6;
  const part = (n) => {
    const k = (n + six) % 6;
    return Math.round(255 * (value - value * 0.85 * Math.max(0, Math.min(k, 4 - k, 1))));
  };
  return [part(5), part(3), part(1)];
}

const css = (rgb) => `rgb(${rgb.join(" ")})`;

function ink(rgb) {
  const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return (0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05) ** 2 > 1.05 * 0.05 ? "#000" : "#fff";
}

/** The segment at each pixel, from 1, as `last_on_top`: the best, without scores the smallest, is above. */
function onTop({ segments }, { width, height }) {
  const map = new Uint16Array(width * height);
  const order = segments.map((_, i) => i).sort((a, b) =>
    segments[a].score === null ? segments[b].area - segments[a].area : segments[a].score - segments[b].score || b - a);
  for (const place of order) {
    const { box: [left, top, right, bottom], mask } = segments[place];
    for (let y = top, i = 0; y <= bottom; y++) {
      for (let x = left; x <= right; x++, i++) if (mask[i]) map[y * width + x] = place + 1;
    }
  }
  return map;
}

/** Draws the picture and its segments; a small picture is enlarged by a whole factor, so that labels are sharp. */
function draw() {
  const { picture, result, chosen } = state, canvas = $("canvas"), context = canvas.getContext("2d");
  const factor = Math.max(1, Math.floor(LEAST_DRAWN / Math.max(picture.width, picture.height)));
  const [width, height] = [(canvas.width = factor * picture.width), (canvas.height = factor * picture.height)];
  context.drawImage(picture.bitmap, 0, 0, width, height);
  if (!result) return;
  const map = (state.map = enlarged(onTop(result, picture), picture, factor));
  if (!$("overlay").checked) return;
  const tint = new ImageData(width, height), line = Math.max(1, Math.round(Math.max(width, height) / 600));
  const colors = result.segments.map(({ class_id }) => color(class_id));
  const light = [false, ...result.segments.map(({ class_id }) => state.page.stuff.includes(class_id))];
  // Between a thing and the stuff around it, the thing has the outline.
  const differ = (i, j) => map[i] !== map[j] && !(light[map[i]] && map[j] && !light[map[j]]);
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      const place = map[i] - 1;
      if (chosen >= 0 && place !== chosen) {
        tint.data[4 * i + 3] = 191;
        continue;
      }
      if (place < 0) continue;
      const edge = (x >= line && differ(i, i - line)) || (x + line < width && differ(i, i + line)) ||
        (y >= line && differ(i, i - line * width)) || (y + line < height && differ(i, i + line * width));
      tint.data.set(colors[place], 4 * i);
      tint.data[4 * i + 3] = 255 * (edge ? 0.9 : light[place + 1] ? 0.25 : 0.55);
    }
  }
  const layer = new OffscreenCanvas(width, height);
  layer.getContext("2d").putImageData(tint, 0, 0);
  context.drawImage(layer, 0, 0);
  label(context, map, { width, height }, result.segments, colors, factor);
}

function enlarged(map, { width, height }, factor) {
  if (factor === 1) return map;
  const large = new Uint16Array(map.length * factor * factor);
  for (let y = 0, i = 0; y < height * factor; y++) {
    const row = Math.floor(y / factor) * width;
    for (let x = 0; x < width * factor; x++, i++) large[i] = map[row + Math.floor(x / factor)];
  }
  return large;
}

/** Writes each label inside its segment, farthest from others, or beside a small one; the smallest come first. */
function label(context, map, { width, height }, segments, colors, factor) {
  const inner = depths(map, width, height, segments.length);
  const size = Math.max(12, Math.round(Math.max(width, height) / 45)), pad = Math.round(size / 3), taken = [];
  context.font = `600 ${size}px system-ui, "DejaVu Sans", sans-serif`;
  context.textBaseline = "middle";
  const order = segments.map((_, i) => i).sort((a, b) => segments[a].area - segments[b].area);
  for (const place of order) {
    const { class_id, score, area } = segments[place], other = state.chosen >= 0 && place !== state.chosen;
    if (!inner[place] || factor * factor * area < (width * height) / 1000 || other) continue;
    const [left, top, right, bottom] = segments[place].box.map((side, i) => factor * (side + (i > 1)));
    const text = state.page.labels[class_id] + (score === null ? "" : ` ${score.toFixed(2)}`);
    const across = context.measureText(text).width + 2 * pad, down = size + 2 * pad;
    const middle = (left + right - across) / 2, level = (top + bottom - down) / 2;
    const spots = [[middle, top - down - 2], [middle, bottom + 2], [right + 2, level], [left - across - 2, level]];
    const inside = [inner[place].x - across / 2, inner[place].y - down / 2];
    if (right - left < 2 * across || bottom - top < 2 * down) spots.push(inside);
    else spots.unshift(inside);
    const free = spots.find(([x, y]) => x >= 0 && y >= 0 && x + across <= width && y + down <= height &&
      !taken.some((one) => x < one[2] && x + across > one[0] && y < one[3] && y + down > one[1]));
    if (!free) continue;
    const [x, y] = free;
    taken.push([x, y, x + across, y + down]);
    context.fillStyle = css(colors[place]);
    context.beginPath();
    context.roundRect(x, y, across, down, pad);
    context.fill();
    context.fillStyle = ink(colors[place]);
    context.fillText(text, x + pad, y + down / 2 + size / 16);
  }
}

/** For each segment its pixel with the largest distance (in both axes) to another segment or the edge. */
function depths(map, width, height, segments) {
  const depth = new Uint16Array(map.length), best = new Array(segments).fill(null);
  const near = (i, j) => (map[i] === map[j] ? depth[j] : 0);
  for (let y = 1; y < height; y++) {
    for (let x = 1; x < width - 1; x++) {
      const i = y * width + x;
      depth[i] = 1 + Math.min(near(i, i - 1), near(i, i - width - 1), near(i, i - width), near(i, i - width + 1));
    }
  }
  for (let y = height - 1; y >= 0; y--) {
    for (let x = width - 1; x >= 0; x--) {
      const i = y * width + x, inside = y < height - 1 && x > 0 && x < width - 1;
      const ahead = inside ? Math.min(near(i, i + 1), near(i, i + width - 1), near(i, i + width), near(i, i + width + 1)) : 0;
      depth[i] = Math.min(depth[i], 1 + ahead);
      const place = map[i] - 1;
      if (place >= 0 && depth[i] > (best[place]?.depth ?? -1)) best[place] = { depth: depth[i], x, y };
    }
  }
  return best;
}

function legend() {
  const { result, picture } = state, list = $("legend");
  const items = (result?.segments ?? []).map(({ class_id, score, area }, place) => {
    const item = document.createElement("li"), button = document.createElement("button");
    const part = (tag, text) => button.appendChild(Object.assign(document.createElement("span"), { className: tag, textContent: text }));
    button.type = "button";
    button.setAttribute("aria-pressed", String(place === state.chosen));
    part("swatch", "").style.background = css(color(class_id));
    part("name", state.page.labels[class_id]);
    part("score", score === null ? "" : score.toFixed(2));
    part("area", `${area.toLocaleString("en")} px, ${((100 * area) / (picture.width * picture.height)).toFixed(1)} %`);
    button.onclick = () => choose(place === state.chosen ? -1 : place);
    item.append(button);
    return item;
  });
  const many = items.length;
  $("count").textContent = result ? `${many} ${many === 1 ? "segment" : "segments"}` : "Segments";
  if (result && !many) {
    const hint = state.page.subtask === "semantic" ? "Nothing was found." : "Nothing has so high a score: lower it.";
    items.push(Object.assign(document.createElement("li"), { className: "hint", textContent: hint }));
  }
  list.replaceChildren(...items);
}

function choose(place) {
  state.chosen = place;
  draw();
  [...$("legend").querySelectorAll("button")].forEach((one, i) => one.setAttribute("aria-pressed", String(i === place)));
}

/** A mask as compressed COCO run lengths, column by column, as `encode_run_lengths`. */
function runLengths({ box: [left, top, right, bottom], mask, area }, height, width) {
  const across = right - left + 1, runs = [];
  let value = 0, run = 0;
  for (let x = 0; x < width; x++) {
    for (let y = 0; y < height; y++) {
      const inside = area && x >= left && x <= right && y >= top && y <= bottom && mask[(y - top) * across + x - left];
      if (Number(Boolean(inside)) !== value) {
        runs.push(run);
        [value, run] = [1 - value, 0];
      }
      run++;
    }
  }
  runs.push(run);
  let counts = "";
  runs.forEach((length, i) => {
    let rest = i > 2 ? length - runs[i - 2] : length;
    for (let more = true; more; ) {
      let five = rest & 31;
      rest >>= 5;
      more = five & 16 ? rest !== -1 : rest !== 0;
      counts += String.fromCharCode((more ? five | 32 : five) + 48);
    }
  });
  return { size: [height, width], counts };
}

function document_() {
  const { picture: { name, width, height }, result } = state, { title, subtask, labels } = state.page;
  const segments = result.segments.map((one) => ({
    class_id: one.class_id, label: labels[one.class_id], score: one.score, box: one.box, area: one.area,
    segmentation: runLengths(one, height, width),
  }));
  return { model: title, subtask, image: { file: name, height, width }, segments };
}

function save(blob, suffix) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${state.picture.name.replace(/\.[^.]*$/, "") || "picture"}${suffix}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function stopCamera() {
  state.camera?.getTracks().forEach((track) => track.stop());
  state.camera = null;
  $("camera").setAttribute("aria-pressed", "false");
  $("camera").textContent = "Camera";
}

/** Segments the camera's frames one after another until it is stopped; the last one stays. */
async function camera() {
  if (state.camera) return stopCamera();
  const turn = ++state.turn;
  $("error").hidden = true;
  const video = $("video");
  let stream;
  try {
    if (!navigator.mediaDevices) throw new Error("a page without HTTPS may not use it");
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: 640 } } });
    if (turn !== state.turn) return stream.getTracks().forEach((track) => track.stop());
    state.camera = stream;
    $("camera").setAttribute("aria-pressed", "true");
    $("camera").textContent = "Stop camera";
    stream.getTracks().forEach((track) => { track.onended = () => state.camera === stream && stopCamera(); });
    video.srcObject = stream;
    await video.play();
    while (state.camera === stream && $("error").hidden) {
      await segmentBitmap(await createImageBitmap(video), "camera.png", true);
      await new Promise(requestAnimationFrame);
    }
  } catch (error) {
    // Whoever stops the camera also interrupts what waits for it.
    if (turn === state.turn && (state.camera || !stream)) {
      fail(`The camera cannot be used (${firstLine(error)}): allow it in the browser, or choose a picture.`);
    }
  }
  if (turn === state.turn) stopCamera();
}

const shown = (threshold) => Number(threshold).toFixed(3).replace(/0$/, "");

async function another() {
  $("threshold-value").textContent = shown($("threshold").value);
  if (!state.result || state.camera) return;
  const picture = state.picture;
  try {
    const reply = await ask({ kind: "threshold", threshold: Number($("threshold").value) });
    if (state.picture === picture) show(picture, { ...state.result, ...reply });
  } catch (error) {
    fail(error);
  }
}

function examples(names) {
  $("examples").hidden = !names.length;
  $("examples").append(...names.map((name, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(Object.assign(document.createElement("img"), { src: name, alt: `Example ${i + 1}` }));
    button.onclick = () => take(get(new URL(name, import.meta.url)).then((answer) => answer.blob()), name.split("/").pop());
    return button;
  }));
}

function connect() {
  const stage = $("stage");
  const taken = (list) => list?.[0] && take(list[0], list[0].name || "picture.png");
  $("choose").onclick = () => $("file").click();
  $("file").onchange = () => { taken($("file").files); $("file").value = ""; };
  $("camera").onclick = camera;
  $("overlay").onchange = () => state.picture && draw();
  $("threshold").oninput = another;
  $("device").onchange = () => {
    state.ready = openModel().then(() => busy(""));
    state.ready.catch(fail);
    // The new worker has no outputs for another threshold.
    if (state.picture && state.camera) show(state.picture, null);
    else if (state.picture) segmentBitmap(state.picture.bitmap, state.picture.name);
  };
  $("save-picture").onclick = () => $("canvas").toBlob((blob) => save(blob, ".segments.png"), "image/png");
  $("save-json").onclick = () => save(new Blob([JSON.stringify(document_())], { type: "application/json" }), ".segments.json");
  $("canvas").onclick = (event) => {
    if (!state.result) return;
    const canvas = $("canvas"), box = canvas.getBoundingClientRect();
    const x = Math.floor(((event.clientX - box.left) * canvas.width) / box.width);
    const y = Math.floor(((event.clientY - box.top) * canvas.height) / box.height);
    const place = (state.map[y * canvas.width + x] ?? 0) - 1;
    choose(place === state.chosen ? -1 : place);
  };
  for (const kind of ["dragover", "dragleave", "drop"]) {
    addEventListener(kind, (event) => {
      event.preventDefault();
      stage.dataset.over = String(kind === "dragover");
      if (kind === "drop") taken(event.dataTransfer.files);
    });
  }
  addEventListener("paste", (event) => taken(event.clipboardData.files));
}

async function begin() {
  connect();
  state.ready = (async () => {
    state.page = await (await get(new URL("page.json", import.meta.url))).json();
    document.title = $("title").textContent = state.page.title;
    $("threshold").value = state.page.threshold;
    $("threshold-value").textContent = shown(state.page.threshold);
    $("threshold-row").hidden = state.page.subtask === "semantic";
    $("device-row").hidden = !(state.page.library.webgpu && navigator.gpu);
    examples(state.page.examples);
    await openModel();
    busy("");
  })();
  await state.ready.catch((error) => {
    if (error.superseded) return;
    fail(error);
    say("The model is not loaded.");
  });
}

if (typeof document === "undefined") self.onmessage = serve;
else begin();
