// Requests under way: pictures are streamed, videos are jobs of the server that are looked at now and then.

const STREAMS = 4;  // open at a time: a browser opens six connections to a server, for all tabs, and each needs one now and then
const TRIES = 3;  // of a picture that is lost on its way; with its seed it comes out the same

function begin(settings) {
  const { info } = state;
  const sources = info.takes_image ? [...state.sources] : [];
  run({ kind: info.makes_videos ? "video" : "picture", settings, sources, mask: info.takes_mask && sources.length ? state.mask : null,
    model: info.model, layout: info.layout, when: Date.now() });
}

// Videos that an earlier life of this page ordered; the latest comes onto the stage.
async function takeUp(pending) {
  if (!pending.length) return;
  while (!state.info?.pipeline) await sleep(200);
  for (const one of pending) run(one);
}

// text, value of max: how far it is; max 0 for nobody knows.
async function run(order) {
  const work = { ...order, abort: new AbortController(), text: "Sending", value: 0, max: 0, began: performance.now() };
  work.card = make("li", {}, make("button", { type: "button" }, make("b", {}, work.settings.prompt), make("span")));
  work.card.firstChild.onclick = () => { stage(work); $("cancel").focus(); };
  state.works.push(work);
  showProblem(null);
  showButtons();
  stage(work);
  say("Started.");
  try {
    const items = await (work.kind === "video" ? makeVideo(work) : drawPictures(work));
    work.is_done = true;
    if (state.work === work) showResults(items);
    await addItems(items);
    say(`Done in ${short(items[0].seconds)} seconds.`);
  } catch (error) {
    const is_cancelled = work.abort.signal.aborted;
    if (state.work === work) {
      $("canvas").replaceChildren(empty);
      empty.textContent = is_cancelled ? "Cancelled." : "What you draw appears here.";
    }
    if (is_cancelled) say("Cancelled.");
    else showProblem(error instanceof Problem ? error : new Problem(`It failed: ${error.message}`));
  } finally {
    if (work.id) forget(work.id);
    // What had the focus goes away: it must not fall to the start of the page.
    const had_focus = [$("cancel"), work.card.firstChild].includes(document.activeElement);
    state.works.splice(state.works.indexOf(work), 1);
    if (state.work === work) leaveStage();
    showOthers();
    showButtons();
    if (had_focus && !(document.activeElement === $("cancel") && state.work)) $("draw").focus({ preventScroll: true });
    refresh();
  }
}

function cancel(work) {
  work.abort.abort();
  showProgress(work, "Cancelling", work.value, work.max);
}

// The stage

function stage(work) {
  state.work = work;
  $("caption").textContent = "";
  shapeCanvas(work.settings, work.sources.length);
  const count = work.settings.n ?? 1;
  if (work.kind === "video" && work.sources.length) showPreview(work, work.sources[0]);
  empty.textContent = "The video appears here when it is done.";
  $("canvas").replaceChildren(...work.kind === "video" ? [empty] : Array.from({ length: count }, () => make("div", { class: "blank" })));
  $("running").hidden = false;
  showProgress(work, work.text, work.value, work.max);
  showOthers();
  if ($("stage").getBoundingClientRect().top > innerHeight / 2) $("stage").scrollIntoView();
}

function leaveStage() {
  state.work = null;
  $("running").hidden = true;
  showTitle();
}

function showOthers() {
  const cards = state.works.filter((work) => work !== state.work).map((work) => work.card);
  // Those that stay are not touched: one of them may have the focus.
  for (const card of [...$("others").children]) if (!cards.includes(card)) card.remove();
  cards.forEach((card, place) => {
    const there = $("others").children[place];
    if (there !== card) $("others").insertBefore(card, there ?? null);
  });
}

function showProgress(work, text, value, max) {
  Object.assign(work, { text, value, max });
  work.card.querySelector("span").textContent = text;
  if (state.work !== work) return;
  $("step").textContent = text;
  if (max) Object.assign($("progress"), { max, value });
  else $("progress").removeAttribute("value");
  showTitle();
}

function tellSteps(work, done, total) {
  if (done === 0) refresh();
  const rate = pace(work, done);
  const left = rate ? ` · ${short(rate)} steps/s · ${lasting((total - done) / rate)} left` : "";
  showProgress(work, done < total ? `Step ${done} of ${total}${left}` : "Decoding", done, done && total);  // before the first step it just moves
  sayHalf(work);
}

// How much comes in a second; 0 until that is known.
function pace(work, value) {
  const now = performance.now();
  if (!work.first || value < work.first.value) work.first = { at: now, value };  // a restart begins anew
  const gone = (now - work.first.at) / 1000;
  return gone > .1 ? (value - work.first.value) / gone : 0;
}

// Half is all that is said aloud of how far it is.
function sayHalf(work) {
  if (work.is_half || !work.max || work.value * 2 < work.max) return;
  work.is_half = true;
  if (work.value < work.max) say("Half of it is done.");
}

function tellPosition(work, position) {
  showProgress(work, position ? `Waiting: ${position} ${position === 1 ? "request comes" : "requests come"} first` : "Next in line", 0, 0);
  say(work.text);
  if (position) refresh();
}

function shapeCanvas({ width, height, n = 1 }, num_sources = state.sources.length) {
  const [w, h] = [["width", width], ["height", height]].map(([side, value]) => value ?? state.info?.parameters?.[side]?.default);
  const columns = Math.ceil(Math.sqrt(n)), rows = Math.ceil(n / columns);
  const ratio = w && h && (width || !num_sources) ? w / h : 1;
  for (const [name, value] of Object.entries({ columns, rows, ratio: ratio * columns / rows })) $("canvas").style.setProperty(`--${name}`, value);
}

function showPreview(work, blob, place = 0) {
  const picture = shownOf(blob, "The picture so far");
  picture.className = "rough";
  picture.addEventListener("load", () => {
    if (state.work !== work || work.is_done) return;
    const there = $("canvas").children[place];
    there ? there.replaceWith(picture) : $("canvas").append(picture);
  });
}

function showResults(items) {
  shapeCanvas({ ...items[0].settings, n: items.length });
  const shown = items.map((item) => shownOf(item.blob, item.settings.prompt, true));
  $("canvas").replaceChildren(...shown.map((it, place) => {
    if (items[place].kind === "video") return it;
    const open = make("button", { type: "button", "aria-label": `Show large: ${it.alt}${items.length > 1 ? `, ${place + 1}` : ""}` }, it);
    open.item = items[place];
    open.onclick = () => view(items[place]);
    return open;
  }));
  const details = [`${short(items[0].seconds)} s`];
  if ("seed" in items[0].used) details.push(`seed ${items[0].used.seed}`);
  if (items.length > 1) details.push(`${items.length} pictures`);
  if (items[0].note) details.push(items[0].note);
  measured(shown[0], (width, height) => {
    shapeCanvas({ width, height, n: items.length });
    $("caption").textContent = [`${width} × ${height}`, ...details].join(" · ");
  });
  play(shown[0]);
}

// Pictures

async function drawPictures(work) {
  const giveBack = await streamFor(work);
  try {
    return await drawPatiently(work);
  } finally { giveBack(); }
}

// Waits until this one may open a stream; the function ends that.
async function streamFor(work) {
  const isNext = () => state.works.find((one) => one.kind === "picture" && !one.is_streaming) === work;
  for (let giveBack = null; ; await sleep(200)) {
    work.abort.signal.throwIfAborted();
    if (isNext()) giveBack = await freeStream();
    if (giveBack) {
      work.is_streaming = true;
      return giveBack;
    }
    work.is_heard = true;
    showProgress(work, "Waiting for your pictures before it", 0, 0);
  }
}

// One of the streams of all tabs, where the browser can count these; null where none is free.
async function freeStream() {
  if (!navigator.locks) return state.works.filter((one) => one.is_streaming).length < STREAMS ? () => {} : null;
  for (let number = 1; number <= STREAMS; number++) {
    const giveBack = await new Promise((resolve) => {
      const hold = (lock) => lock ? new Promise((end) => resolve(end)) : resolve(null);
      navigator.locks.request(`omni-sp-stream-${number}`, { ifAvailable: true }, hold).catch(() => resolve(() => {}));
    });
    if (giveBack) return giveBack;
  }
  return null;
}

async function drawPatiently(work) {
  const { signal } = work.abort;
  for (let tries = 1; ; tries++) {
    try {
      return await drawOnce(work);
    } catch (error) {
      if (signal.aborted || !error.is_lost || tries === TRIES) throw error;
      showProgress(work, `${error.message} It is drawn when the server is back.`, 0, 0);
      say(work.text);
      await sleep(500 * tries);
      await serverBack(signal);
      showProgress(work, "Sending again", 0, 0);
    }
  }
}

// Adapters as the server reads them, in JSON and in forms alike.
function asSent({ lora, ...rest }) {
  return lora ? { ...rest, lora: JSON.stringify(adaptersIn(lora)) } : rest;
}

async function drawOnce(work) {
  const { width, height, ...rest } = asSent(work.settings);
  const { signal } = work.abort;
  const requested = { ...rest, response_format: "b64_json", output_format: "png", stream: true, progress: true, partial_images: 3 };
  if (width) requested.size = `${width}x${height}`;
  let answer;
  if (work.sources.length) {
    const body = new FormData();
    for (const [name, value] of Object.entries(requested)) body.append(name, `${value}`);
    for (const picture of work.sources) body.append(work.sources.length > 1 ? "image[]" : "image", picture, picture.name ?? "picture.png");
    if (work.mask) body.append("mask", work.mask, "mask.png");
    answer = await call("v1/images/edits", { method: "POST", body, signal });
  } else {
    answer = await call("v1/images/generations", { method: "POST", body: JSON.stringify(requested), signal,
      headers: { "Content-Type": "application/json" } });
  }
  work.is_heard = true;
  const pictures = [];
  let note = null;
  try {
    for await (const event of serverEvents(answer)) {
      if (event.error) throw new Problem(event.error.message, { param: event.error.param, is_lost: event.status === 503 });
      const kind = `${event.type}`.split(".").pop();
      (event.previews ?? []).forEach((one, place) => showPreview(work, asBlob(one), place));
      if (kind === "progress" && event.total) tellSteps(work, event.step, event.total);
      else if (kind === "progress") tellPosition(work, event.position ?? 0);
      else if (kind === "partial_image") showPreview(work, asBlob(event));
      else if (kind === "completed") { pictures.push(asBlob(event)); note = event.note; }
    }
  } catch (error) {
    if (signal.aborted || error instanceof Problem) throw error;
    throw new Problem("The connection broke.", { is_lost: true });
  }
  if (!pictures.length) throw new Problem("The connection ended before the picture was there.", { is_lost: true });
  const when = Date.now();
  return pictures.map((blob, place) => asItem(work, blob, { when, place: place + 1, of: pictures.length, note }));
}

function asBlob(event) {
  const bytes = Uint8Array.from(atob(event.b64_json), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: `image/${event.output_format ?? "png"}` });
}

// What was asked for, and, as used, what the model chose besides.
function asItem({ kind, settings, sources, mask, model, layout, began }, blob, more) {
  const used = { ...settings };
  const chosen = state.info?.model === model ? state.info.parameters : {};
  for (const [name, about] of Object.entries(chosen ?? {}))
    if (`${about.default ?? ""}`.trim() && !(sources.length && ["width", "height"].includes(name))) used[name] ??= about.default;
  return { kind, blob, settings, used, sources, mask, model, layout, seconds: (performance.now() - began) / 1000, ...more };
}

// Videos

async function makeVideo(work) {
  const { signal } = work.abort;
  const is_taken_up = Boolean(work.id);
  if (!is_taken_up) await orderVideo(work);
  work.is_heard = true;
  const path = `v1/videos/${encodeURIComponent(work.id)}`;
  try {
    let video;
    for (;; await sleep(700)) {
      signal.throwIfAborted();
      video = await patiently(work, async () => (await call(path, { signal })).json());
      signal.throwIfAborted();
      if (video.status === "failed") throw new Problem(video.error?.message ?? "The video failed.");
      if (video.status === "completed") break;
      if (video.status === "queued") showProgress(work, "Waiting: other requests come first", 0, 0);
      else tellPercent(work, video.progress ?? 0);
    }
    showProgress(work, "Fetching the video", 100, 100);
    const blob = await patiently(work, async () => (await call(`${path}/content`, { signal })).blob());
    const item = asItem(work, blob, { id: work.id, when: Date.now(), note: video.note ?? null });
    for (const name of ["seed", "num_frames", "fps"]) if (video[name] != null) item.used[name] = video[name];
    if (is_taken_up && video.completed_at) item.seconds = Math.max(1, video.completed_at - video.created_at);
    return [item];
  } catch (error) {
    if (signal.aborted) call(path, { method: "DELETE" }).catch(() => {});
    if (error.status === 404) throw new Problem("The server no longer knows this video: it was deleted, or the server began anew without it.");
    throw error;
  }
}

async function orderVideo(work) {
  const { width, height, ...rest } = asSent(work.settings);
  const body = new FormData();
  for (const [name, value] of Object.entries(rest)) body.append(name, `${value}`);
  if (width) body.append("size", `${width}x${height}`);
  if (work.sources.length) body.append("input_reference", work.sources[0], work.sources[0].name ?? "picture.png");
  // Not to be broken off, and not sent twice: a video whose id nobody heard could not be stopped.
  work.id = (await (await call("v1/videos", { method: "POST", body })).json()).id;
  // The server goes on without us; a reload finds it again.
  const { id, kind, settings, sources, model, layout, when } = work;
  await keep({ id, kind, settings, sources, model, layout, when, is_pending: true });
}

// Ask until there is an answer, however long the server is away, or the key is missing.
async function patiently(work, ask) {
  for (let is_told = false; ; await sleep(1500)) {
    try {
      return await ask();
    } catch (error) {
      const is_locked = error.status === 401;
      if (work.abort.signal.aborted || !(is_locked || error.is_lost || error instanceof TypeError)) throw error;
      showProgress(work, is_locked ? "Waiting for the API key" : "The server does not answer. This goes on when it does.", work.value, work.max);
      if (!is_told) say(work.text);
      is_told = true;
    }
  }
}

function tellPercent(work, percent) {
  const rate = pace(work, percent);
  const left = rate ? ` · ${lasting((100 - percent) / rate)} left` : "";
  showProgress(work, percent < 99 ? `${Math.round(percent)} %${left}` : "Decoding", percent, percent && 100);
  sayHalf(work);
}
