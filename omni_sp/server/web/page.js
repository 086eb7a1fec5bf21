"use strict";
// The page's parts share one script: page (the server, the form), works (requests under way), gallery, mask.

const $ = (id) => document.getElementById(id);
const empty = $("empty");  // now and then not in the document
const FIELDS = ["prompt", "negative_prompt", "width", "height", "n", "num_frames", "fps", "num_inference_steps",
  "true_cfg_scale", "guidance_scale", "strength", "seed", "lora"];
const NUMBERS = FIELDS.slice(2, -1);
const ANSWER_MS = 10_000;  // a server that does not say how it is for so long is not there
// What the server calls a field -> what the form calls it.
const CALLED = { size: "width", input_reference: "image", mask_image: "mask" };
// key: the API key. info: what GET v1/info said last. works: requests under way; work: the one on the stage.
// sources: pictures to start from; mask: of the first one. items: the gallery, newest first; shown: the one in the viewer; deleted: what can be undone; is_kept: the last one came into the store.
const state = { key: "", info: null, works: [], work: null, sources: [], mask: null, items: [], deleted: [], shown: null, database: null, is_kept: true };

// is_lost: not refused, but broken off; it may go well when the server is back.
class Problem extends Error {
  constructor(message, { param = null, status = 0, is_lost = false } = {}) { super(message); Object.assign(this, { param, status, is_lost }); }
}

// Storage may be forbidden; the page then forgets, and works.
function recall(storage, name) { try { return JSON.parse(window[storage].getItem(name)); } catch { return null; } }
function remember(storage, name, value) {
  try { value === null ? window[storage].removeItem(name) : window[storage].setItem(name, JSON.stringify(value)); } catch { /* forgets */ }
}
const sleep = (ms) => new Promise((resume) => setTimeout(resume, ms));
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
const short = (number) => number >= 100 ? number.toFixed(0) : number >= 10 ? number.toFixed(1) : number.toFixed(2);
const lasting = (s) => s < 100 ? `${Math.ceil(s)} s` : s < 6000 ? `${Math.round(s / 60)} min` : `${short(s / 3600)} h`;
const say = (text) => { $("say").textContent = text; };

// The server

async function call(path, options = {}) {
  const headers = new Headers(options.headers);
  if (state.key) headers.set("Authorization", `Bearer ${state.key}`);
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    await requireReadable(options.body);
    throw new Problem("The server does not answer.", { is_lost: true });
  }
  if (answer.ok) return answer;
  const reported = (await answer.json().catch(() => ({}))).error ?? {};
  if (answer.status === 401) askForKey(state.key ? "The server does not know this key." : "");
  // 503: it is starting, or ending to be started anew; 502 and 504 are a proxy's, in front of none.
  throw new Problem(reported.message ?? `The server answered ${answer.status} ${answer.statusText}.`,
    { param: reported.param, status: answer.status, is_lost: [502, 503, 504].includes(answer.status) });
}

// A chosen file may have gone since, and fetch() says no more than that something failed.
async function requireReadable(body) {
  for (const file of body instanceof FormData ? body.values() : [])
    if (file instanceof Blob) await file.arrayBuffer().catch(() => {
      throw new Problem("A chosen picture can no longer be read: choose it again.", { param: "image" });
    });
}

async function* serverEvents(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (let is_first = true; ; is_first = false) {
      // A proxy may keep the whole stream until its end; where something has come, more comes soon.
      const { value, done } = await (is_first ? reader.read() : inTime(reader.read(), 4000 * (state.info?.limits.keep_alive_s ?? 15)));
      if (done) return;
      let from = Math.max(0, rest.length - 1);
      rest += value.replaceAll("\r", "");
      for (let end; (end = rest.indexOf("\n\n", from)) >= 0; from = 0) {
        const lines = rest.slice(0, end).split("\n").filter((line) => line.startsWith("data:"));
        rest = rest.slice(end + 2);
        const data = lines.map((line) => line.slice(5)).join("\n").trim();
        if (data && data !== "[DONE]") yield JSON.parse(data);
      }
    }
  } finally { reader.cancel().catch(() => {}); }
}

// A stream whose server has left out several signs of life is dead, though nobody has said so.
async function inTime(promise, ms) {
  let timer;
  const late = new Promise((_, refuse) => { timer = setTimeout(() => refuse(new Error(`nothing came for ${ms} ms`)), ms); });
  try { return await Promise.race([promise, late]); } finally { clearTimeout(timer); }
}

function askForKey(problem) {
  const was_hidden = $("key-form").hidden;
  $("key-form").hidden = false;
  if ($("key-problem").textContent !== problem) $("key-problem").textContent = problem;  // said once
  if (was_hidden) $("key").focus();
}

async function refresh() {
  try {
    const info = await (await call("v1/info", { signal: AbortSignal.timeout(ANSWER_MS) })).json();
    const shape = ({ model, pipeline, parameters, limits } = {}) => JSON.stringify([model, pipeline, parameters, limits]);
    const is_new = shape(state.info ?? {}) !== shape(info);
    state.info = info;
    $("key-form").hidden = true;
    if (info.pipeline && is_new) fitForm();
    showServer();
  } catch (error) {
    const is_refused = error instanceof Problem && !error.is_lost;
    if (error.status === 401) showStatus("locked", "API key needed");
    else showStatus("silent", is_refused ? error.message : "The server does not answer.");
    state.info = state.info && { ...state.info, status: "silent" };
  }
  showButtons();
}

async function keepFresh() {
  for (;;) {
    if (!document.hidden) await refresh();
    await sleep(state.info?.status === "ready" && !state.works.length ? 4000 : 1500);
  }
}

// Wait until the server is ready again, as long as it takes.
async function serverBack(signal) {
  for (;;) {
    await refresh();
    signal.throwIfAborted();
    if (state.info?.status === "ready") return;
    if (state.info?.status === "failed") throw new Problem("The server has failed; its log says why.");
    await sleep(1000);
    signal.throwIfAborted();
  }
}

// Only what is out of the ordinary is said aloud, and what follows until it is over.
let was_odd = false;
function showStatus(is, text) {
  const is_new = $("status").dataset.is !== is;
  const is_odd = ["silent", "restarting", "draining", "failed", "closed"].includes(is);
  $("status").dataset.is = is;
  if ($("status").textContent !== text) $("status").textContent = text;
  if (is_new && (is_odd || was_odd)) say(text);
  was_odd = is_odd || was_odd && is !== "ready";
}

function showServer() {
  const { info } = state;
  const waits = info.queued ? `, ${info.queued} waiting` : "";
  const words = { ready: info.running ? `drawing${waits}` : "ready", starting: "loading the model",
    restarting: "the ranks are starting again", draining: "shutting down", closed: "closed", failed: "failed" };
  showStatus(info.status, words[info.status] ?? info.status);
  $("model").textContent = info.pipeline ? `${info.model} · ${info.pipeline}` : info.model;
  $("server").hidden = !info.pipeline;
  showTitle();
  if (!info.pipeline) return;
  $("rings").className = info.running ? "busy" : "";
  $("rings").setAttribute("aria-label", info.layout);
  $("rings").title = info.layout;
  $("rings").replaceChildren(...info.rings.map((ring) => make("div", {}, ...ring.map((rank) => make("span", {}, `${rank}`)))));
  const ulysses = info.rings[0]?.length ?? 1;
  const facts = {
    Ranks: info.ranks > 1 ? `${info.ranks} = ${ulysses} Ulysses × ${info.ranks / ulysses} ring` : "1",
    ...(info.replicas.length > 1 ? { Replicas: info.replicas.map((one) => one.running ? "drawing" : one.status).join(" · ") } : {}),
    Device: `${info.device}, ${info.dtype}`,
    Speed: info.steps_per_second ? `${short(info.steps_per_second)} steps/s` : "not measured yet",
  };
  $("server-facts").replaceChildren(
    ...Object.entries(facts).map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

function showTitle() {
  const { work, info } = state;
  const far = work?.max ? `${Math.floor(100 * work.value / work.max)} % · ` : "";
  document.title = `${far}${info?.model ?? "Omni-SP"}${info ? " · Omni-SP" : ""}`;
}

// The form

function fitForm() {
  const { info } = state;
  for (const field of document.querySelectorAll("[data-takes]")) {
    const name = field.dataset.takes;
    const about = info.parameters[name];
    field.hidden = name === "image" ? !info.takes_image : !about;
    const input = $(name);
    if (!about || input.type !== "number") continue;
    input.placeholder = about.default ?? (name === "seed" ? "random" : "default");
    input.step = about.multiple ?? "any";
    input.title = [about.minimum > 0 && `at least ${about.minimum}`, about.maximum < Number.MAX_SAFE_INTEGER && `at most ${about.maximum}`,
      about.multiple > 1 && name !== "num_frames" && `a multiple of ${about.multiple}`].filter(Boolean).join(", ");
    for (const [side, bound] of [["min", about.minimum], ["max", about.maximum]])
      // Beyond that, JavaScript would make another number of it.
      bound === undefined ? input.removeAttribute(side) : input[side] = Math.min(bound, Number.MAX_SAFE_INTEGER);
  }
  document.querySelector("label[for=guidance_scale]").textContent = info.parameters.true_cfg_scale ? "Distilled guidance" : "Guidance";
  $("examples").hidden = !info.examples.length;
  $("examples").replaceChildren(...info.examples.map((prompt) => {
    const use = make("button", { type: "button" }, prompt);
    use.onclick = () => { $("prompt").value = prompt; keepForm(); $("prompt").focus(); };
    return make("li", {}, use);
  }));
  $("loras").replaceChildren(...(info.parameters.lora?.names ?? []).map((name) => {
    const scale = make("input", { id: `lora-${name}`, type: "number", inputmode: "decimal", step: "any", placeholder: "off" });
    return make("div", { class: "field" }, make("label", { for: scale.id }, name), scale);
  }));
  showAdapters();
  $("image").multiple = info.takes_many_images;
  if (!info.takes_image) state.sources = [];
  showSources();
  showLength();
  if (!state.work && empty.isConnected) shapeCanvas({});
}

const scales = () => [...document.querySelectorAll("#loras input")];
function showAdapters() {
  const on = Object.fromEntries(adaptersIn($("lora").value).map(({ name, scale }) => [`lora-${name}`, scale]));
  for (const input of scales()) input.value = on[input.id] ?? "";
}
function readAdapters() {
  const on = scales().filter((input) => input.value !== "");
  $("lora").value = on.map((input) => `${input.id.slice(5)}=${input.value}`).join(", ");
}

// Frames and frames a second as seconds.
function showLength() {
  const about = state.info?.parameters ?? {};
  $("length").hidden = !about.num_frames;
  if (!about.num_frames) return;
  const [frames, fps] = ["num_frames", "fps"].map((name) => Number($(name).value || about[name]?.default));
  const rule = about.num_frames.multiple > 1 ? `Frames: 1 + a multiple of ${about.num_frames.multiple}.` : "";
  $("length").textContent = [frames > 0 && fps > 0 ? `${short(frames / fps)} s of video.` : "", rule].join(" ").trim();
}

function showSources() {
  const { info, sources } = state;
  $("sources").replaceChildren(...sources.map((picture, place) => {
    const remove = make("button", { type: "button", "aria-label": `Remove picture ${place + 1}` }, "×");
    remove.onclick = () => {
      sources.splice(place, 1);
      if (!place) state.mask = null;
      showSources();
      ($("sources").children[Math.min(place, sources.length - 1)]?.querySelector("button") ?? $("image")).focus();
    };
    const shown = make("li", {}, shownOf(picture, `Picture ${place + 1} to start from`), remove);
    if (!place && state.mask) {
      const mask = shownOf(state.mask, "");
      mask.className = "mask";
      remove.before(mask);
    }
    return shown;
  }));
  if (!info?.pipeline) return;
  $("image-label").textContent = !sources.length ? "Add a picture" : info.takes_many_images ? "Add another" : "Replace it";
  $("image-hint").textContent = (info.needs_image ? "This model starts from a picture. " : info.makes_videos ? "The first frame. " : "To edit one. ")
    + (matchMedia("(pointer: coarse)").matches ? "PNG, JPEG or WebP." : "PNG, JPEG or WebP; drop and paste work too.");
  $("mask-field").hidden = !info.takes_mask || !sources.length;
  $("mask").textContent = state.mask ? "Change the mask" : "Paint a mask";
  $("mask-remove").hidden = !state.mask;
  $("mask-hint").textContent = state.mask ? "Only what is painted is drawn anew." : "It says what is to be drawn anew.";
  for (const side of ["width", "height"])
    $(side).placeholder = sources.length ? "auto" : info.parameters[side]?.default ?? "default";
  $("draw").textContent = info.makes_videos ? "Make the video" : sources.length ? "Edit" : "Draw";
}

function addSources(files) {
  const { info } = state;
  const pictures = [...files].filter((file) => /^image\/(png|jpeg|webp)$/.test(file.type));
  showProblem(null);
  if (pictures.length) {
    if (!info.takes_many_images || !state.sources.length) state.mask = null;
    state.sources = info.takes_many_images ? [...state.sources, ...pictures] : pictures.slice(0, 1);
  }
  showSources();
  if (pictures.length < files.length) showProblem(new Problem("Only PNG, JPEG and WebP pictures can be read.", { param: "image" }));
}

let lost_focus = false;  // the button had it when it was disabled
function showButtons() {
  const { info, work } = state;
  const is_able = info?.status === "ready" && info.makes !== "sound";
  const has_focus = document.activeElement === $("draw");
  $("draw").disabled = !is_able;  // more may be asked for while one is made
  if (is_able && lost_focus && document.activeElement === document.body) $("draw").focus({ preventScroll: true });
  lost_focus = !is_able && (has_focus || lost_focus);
  if (work || !empty.isConnected) return;
  const words = { starting: "The model is loading.", restarting: "The ranks are starting again.", draining: "The server is shutting down.",
    failed: "The server has failed; its log says why.", silent: "The server does not answer. This page goes on when it does." };
  const sound = "This model makes sound, which this page does not offer.";
  const text = info?.makes === "sound" ? sound : words[info?.status] ?? "What you draw appears here.";
  if (empty.textContent !== text && empty.textContent !== "Cancelled.") empty.textContent = text;
}

// What is wrong with a number, in words that stay; null where nothing is.
function wrongWith(input) {
  const { badInput, rangeUnderflow, rangeOverflow, stepMismatch } = input.validity;
  const is = `${input.labels[0].textContent} ${input.value}`;
  if (badInput) return `${input.labels[0].textContent}: give a number.`;
  if (rangeUnderflow) return `${is}: give at least ${input.min}.`;
  if (rangeOverflow) return `${is}: give at most ${input.max}.`;
  if (!stepMismatch) return null;
  const step = Number(input.step), least = Number(input.min || 0);
  const below = least + Math.floor((input.value - least) / step) * step;
  const near = [below, below + step].filter((value) => !input.max || value <= Number(input.max));
  const rule = step === 1 ? "a whole number" : least % step ? `${least % step} + a multiple of ${step}` : `a multiple of ${step}`;
  return `${is}: give ${rule}, such as ${near.join(" or ")}.`;
}

function readForm() {
  const { info, sources } = state;
  const settings = {};
  readAdapters();
  for (const input of scales()) {
    const wrong = wrongWith(input);
    if (wrong) throw new Problem(wrong, { param: input.id });
  }
  for (const name of FIELDS) {
    const text = $(name).value.trim();
    if ($(name).closest("[hidden]")) continue;
    const wrong = NUMBERS.includes(name) && wrongWith($(name));
    if (wrong) throw new Problem(wrong, { param: name });
    if (text !== "") settings[name] = NUMBERS.includes(name) ? Number(text) : text;
  }
  if (!settings.prompt) throw new Problem("Say what there is to be seen.", { param: "prompt" });
  if (("width" in settings) !== ("height" in settings)) {
    // One side alone: the other is the model's own.
    const other = "width" in settings ? "height" : "width";
    const known = info.parameters[other]?.default;
    if (!known || sources.length) throw new Problem(`Give the ${other} too, or neither.`, { param: other });
    settings[other] = known;
  }
  const { pixels, images, body_bytes } = info.limits;
  if (settings.width * settings.height > pixels)
    throw new Problem(`${settings.width} × ${settings.height} pixels are more than this server draws: ${pixels}.`,
      { param: settings.height > settings.width ? "height" : "width" });
  if (info.needs_image && !sources.length) throw new Problem("This model starts from a picture: add one.", { param: "image" });
  if (sources.length > images) throw new Problem(`${sources.length} pictures are more than this server takes: ${images}.`, { param: "image" });
  const bytes = [...sources, state.mask].reduce((sum, file) => sum + (file?.size ?? 0), 10_000);
  if (bytes > body_bytes) throw new Problem(`The pictures are larger than this server takes: ${short(body_bytes / 2 ** 20)} MiB.`, { param: "image" });
  // Chosen here, so that the gallery can show it, and a request that was lost can be sent again.
  if (info.parameters.seed) settings.seed ??= crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
  return settings;
}

function writeForm(settings) {
  for (const name of FIELDS) $(name).value = settings[name] ?? "";
  showAdapters();
  keepForm();
}
function keepForm() {
  remember("localStorage", "omni-sp-form", Object.fromEntries(FIELDS.map((name) => [name, $(name).value])));
  showLength();
}

// An error, under the field that it names, else above the button.
function showProblem(error) {
  for (const field of document.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-errormessage");
  }
  const name = error?.param?.replace(/[^\w-].*/, "");
  const field = name ? $(CALLED[name] ?? name) : null;
  const place = field && $("form").contains(field) ? field.closest(".field:not([hidden])") : null;
  $("problem").textContent = "";
  if (place) place.parentElement.className === "numbers" ? place.after($("problem")) : place.append($("problem"));
  else $("buttons").before($("problem"));
  $("problem").textContent = error?.message ?? "";
  if (!place) return;
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-errormessage", "problem");
  field.focus();
}

// What the user does

$("form").onsubmit = (event) => {
  event.preventDefault();
  // A second click on the same request comes before the server has answered the first.
  if ($("draw").disabled || state.works.some((one) => !one.is_heard)) return;
  try {
    begin(readForm());
  } catch (error) { showProblem(error); }
};
$("form").oninput = () => { if (state.info?.pipeline) readAdapters(); keepForm(); };
$("reset").onclick = () => {
  writeForm({});
  Object.assign(state, { sources: [], mask: null });
  showSources();
  showProblem(null);
  $("prompt").focus();
};
document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]") || event.isComposing || $("key-form").contains(event.target)) return;
  if (event.repeat) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); $("form").requestSubmit(); }
  if (event.key === "Escape" && state.work) cancel(state.work);
});
// Once is once: a key that is held presses no button again, and of a double click the first click counts; but many
// clicks turn many pages. What moves under the pointer would else be deleted, or drawn, too.
document.addEventListener("keydown", (event) => {
  if (event.repeat && event.key === "Enter" && event.target.tagName !== "TEXTAREA") event.preventDefault();
}, true);
document.addEventListener("click", (event) => {
  if (event.detail < 2 || !event.target.closest("button, #viewer") || event.target.closest("video, #newer, #older")) return;
  event.preventDefault();
  event.stopPropagation();
}, true);
$("cancel").onclick = () => { if (state.work) cancel(state.work); };
$("image").onchange = () => { addSources($("image").files); $("image").value = ""; };
const takesFiles = () => state.info?.takes_image && !document.querySelector("dialog[open]");
document.addEventListener("paste", (event) => { if (takesFiles() && event.clipboardData.files.length) addSources(event.clipboardData.files); });
// Pictures may be dropped anywhere; nowhere does the browser leave the page for them.
const bringsFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", (event) => {
  if (!bringsFiles(event)) return;
  event.preventDefault();
  document.body.classList.toggle("over", Boolean(takesFiles()));
});
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("over"); });
document.addEventListener("drop", (event) => {
  if (!bringsFiles(event)) return;
  event.preventDefault();
  document.body.classList.remove("over");
  const { files } = event.dataTransfer;
  if (document.querySelector("dialog[open]")) return;
  if (takesFiles()) addSources(files);
  if (files.length === 1) fillFrom(files[0]);
});
// What a header can carry.
function isKey(key) {
  try { return typeof key === "string" && Boolean(new Headers({ Authorization: `Bearer ${key}` })); } catch { return false; }
}
$("key-form").onsubmit = (event) => {
  event.preventDefault();
  const key = $("key").value.trim();
  if (!isKey(key)) return askForKey("No key has such letters.");
  state.key = key;
  remember("sessionStorage", "omni-sp-key", key);
  $("key-problem").textContent = "";
  refresh().then(() => { if ($("key-form").hidden) $("prompt").focus(); });
};
for (const event of ["online", "offline"]) addEventListener(event, refresh);
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });

addEventListener("DOMContentLoaded", async () => {
  const key = recall("sessionStorage", "omni-sp-key");
  state.key = isKey(key) ? key : "";
  writeForm(recall("localStorage", "omni-sp-form") ?? {});
  keepFresh();
  takeUp(await openGallery());
});
