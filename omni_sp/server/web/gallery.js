// The gallery, in IndexedDB; without that, as long as the page lives. And the viewer of one of its items.

const KEPT = 200;  // items; the oldest go first

function openDatabase() {
  return new Promise((resolve) => {
    let asked;
    try { asked = indexedDB.open("omni-sp", 1); } catch { return resolve(null); }
    asked.onupgradeneeded = () => asked.result.createObjectStore("items", { keyPath: "id", autoIncrement: true });
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = asked.onblocked = () => resolve(null);
  });
}

function inStore(mode, act) {
  if (!state.database) return Promise.resolve(undefined);
  return new Promise((resolve, reject) => {
    const transaction = state.database.transaction("items", mode);
    const asked = act(transaction.objectStore("items"));
    transaction.oncomplete = () => resolve(asked.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

// Write an item, or a video that is not there yet, by its id; says whether that went well.
async function keep(item) {
  try {
    const id = await inStore("readwrite", (store) => store.put(item));
    if (id !== undefined) item.id = id;
    return id !== undefined;
  } catch { return false; }  // no room left
}

async function removeKept(items) {
  const ids = items.map((item) => item.id).filter((id) => id !== undefined);
  if (ids.length) await inStore("readwrite", (store) => ids.map((id) => store.delete(id)).at(-1)).catch(() => {});
}

// A video that did not come about is no item. One that did has taken the place of what was pending.
async function forget(id) {
  const found = await inStore("readonly", (store) => store.get(id)).catch(() => undefined);
  if (found?.is_pending) await inStore("readwrite", (store) => store.delete(id)).catch(() => {});
}

// Returns the videos that are still being made.
async function openGallery() {
  state.database = await openDatabase();
  const all = (await inStore("readonly", (store) => store.getAll()).catch(() => [])) ?? [];
  state.is_kept = state.database !== null;
  state.items = all.filter(isItem).sort(byAge);
  $("items").replaceChildren(...state.items.map(cardOf));
  showGallery();
  return all.filter((item) => item?.is_pending && item.settings).sort((a, b) => a.when - b.when);
}

const isItem = (item) => !item?.is_pending && item?.blob instanceof Blob && item.settings && item.used && item.sources;
const byAge = (a, b) => b.when - a.when || a.place - b.place;

async function addItems(items) {
  for (const item of [...items].reverse()) {
    state.is_kept = await keep(item);
    putIn(item);
  }
  const oldest = state.items.slice(KEPT);
  oldest.forEach(takeOut);
  showGallery();
  await removeKept(oldest);
}

// Where its age puts it.
function putIn(item) {
  const place = state.items.findIndex((one) => byAge(item, one) <= 0);
  state.items.splice(place < 0 ? state.items.length : place, 0, item);
  $("items").insertBefore(cardOf(item), $("items").children[state.items.indexOf(item)] ?? null);
}

function takeOut(item) {
  const place = state.items.indexOf(item);
  state.items.splice(place, 1);
  $("items").children[place].remove();
  for (const open of $("canvas").querySelectorAll("button")) if (open.item === item) open.replaceWith(open.firstChild);
}

// Delete what the user chose. Until the next time, or as long as the page lives, it can be undone.
async function deleteItems(chosen) {
  const items = chosen.filter((item) => state.items.includes(item));
  if (!items.length) return;
  state.deleted = items;
  items.forEach(takeOut);  // at once, so that nobody deletes them twice
  showGallery();
  say(items.length === 1 ? "Deleted." : `${items.length} deleted.`);
  await removeKept(items);
}

async function undoDelete() {
  const { deleted } = state;
  if (!deleted.length) return;
  state.deleted = [];
  for (const item of deleted) {
    state.is_kept = await keep(item);
    putIn(item);
  }
  showGallery();
  say("Undone.");
  if ($("viewer").open) view(deleted[0]);
  else cardAt(deleted[0]).focus();
}

function cardOf(item) {
  const open = make("button", { type: "button", "aria-label": `Show: ${item.settings.prompt}` }, shownOf(item.blob, ""));
  if (item.kind === "video") open.append(make("span", { class: "badge", "aria-hidden": "true" }, "▶ video"));
  open.onclick = () => view(item);
  return make("li", {}, open);
}
const cardAt = (item) => $("items").children[state.items.indexOf(item)]?.firstChild;

function showGallery() {
  const count = state.items.length;
  $("gallery-title").textContent = count ? `Gallery (${count})` : "Gallery";
  $("clear").hidden = !count;
  for (const name of ["undo", "undo-last"]) $(name).hidden = !state.deleted.length;
  $("clear").textContent = "Delete all";
  $("gallery-hint").textContent = !state.is_kept ? "This browser keeps nothing: the pictures go with this page."
    : count ? "" : "What you make is kept here with its settings, in this browser only.";
  showTurns();
}

// Pictures and videos as elements

function shownOf(blob, text, has_controls = false) {
  const address = URL.createObjectURL(blob);
  const release = () => URL.revokeObjectURL(address);
  if (!blob.type.startsWith("video/")) {
    const picture = make("img", { alt: text, decoding: "async" });
    picture.onload = picture.onerror = release;
    picture.src = address;
    return picture;
  }
  // A video reads on while it plays; its address lives as long as the page.
  const video = make("video", { "aria-label": text, playsinline: "", preload: "metadata", loop: "" });
  video.muted = true;
  video.controls = has_controls;
  video.src = address;
  return video;
}

// Its sides in pixels, as it is, whatever was asked for.
function measured(shown, use) {
  if (shown.tagName === "VIDEO") shown.onloadedmetadata = () => use(shown.videoWidth, shown.videoHeight);
  else shown.addEventListener("load", () => use(shown.naturalWidth, shown.naturalHeight));
}

function play(shown) {
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) shown.play?.().catch(() => {});
}

// The viewer

const SHOWN = { negative_prompt: "negative", num_frames: "frames", fps: "frames a second", num_inference_steps: "steps",
  true_cfg_scale: "guidance", guidance_scale: "guidance" };

function view(item) {
  state.shown = item;
  const { prompt, width, height, n, ...rest } = item.used;
  const shown = shownOf(item.blob, prompt, true);
  $("large").replaceChildren(shown);
  play(shown);
  $("viewer-title").textContent = prompt;
  const size = make("dd", {}, width ? `${width} × ${height}` : "auto");
  measured(shown, (w, h) => { size.textContent = `${w} × ${h}`; });
  const facts = Object.entries(rest).map(([name, value]) => [SHOWN[name] ?? name, value]);
  if (item.of > 1) facts.unshift(["picture", `${item.place} of ${item.of}`]);
  if (item.sources.length) facts.unshift(["from", `${item.sources.length === 1 ? "a picture" : `${item.sources.length} pictures`}${item.mask ? " and a mask" : ""}`]);
  facts.push(["took", `${short(item.seconds)} s`], ["model", item.model], ["layout", item.layout], ["made", new Date(item.when).toLocaleString()]);
  if (item.note) facts.push(["note", item.note]);
  $("facts").replaceChildren(make("div", {}, make("dt", {}, "size"), size),
    ...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, `${value}`))));
  URL.revokeObjectURL($("download").href);
  $("download").href = URL.createObjectURL(item.blob);
  const words = prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-");
  const name = [...words].slice(0, 60).join("").replace(/^-|-$/g, "") || item.kind;
  const marks = ["seed" in rest ? `-${rest.seed}` : "", item.of > 1 ? `-${item.place}` : ""].join("");
  $("download").download = `${name}${marks}.${item.blob.type.split("/")[1]}`;
  $("edit").hidden = item.kind !== "picture" || !state.info?.takes_image;
  $("edit").textContent = state.info?.makes_videos ? "Start from this" : "Edit this picture";
  showTurns();
  if (!$("viewer").open) $("viewer").showModal();
  $("viewer").scrollTop = 0;
}
const neighbour = (by) => state.items[state.items.indexOf(state.shown) + by];
const turn = (by) => { if (neighbour(by)) view(neighbour(by)); };
function showTurns() {
  $("newer").disabled = !neighbour(-1);
  $("older").disabled = !neighbour(1);
}

function startFrom(sources, mask = null) {
  $("viewer").close();
  if (state.info?.takes_image) Object.assign(state, { sources: [...sources], mask: state.info.takes_mask ? mask : null });
  showSources();
  $("prompt").focus();
}

$("clear").onclick = () => {
  if ($("clear").textContent === "Delete all") { $("clear").textContent = `Really delete all ${state.items.length}?`; return; }
  deleteItems([...state.items]);
  $("undo").focus();
};
$("undo").onclick = $("undo-last").onclick = undoDelete;
$("clear").onblur = () => { $("clear").textContent = "Delete all"; };
$("viewer").onkeydown = (event) => {
  if (event.target.tagName === "VIDEO") return;
  if (event.key === "ArrowLeft") turn(-1);
  if (event.key === "ArrowRight") turn(1);
};
// A click beside it closes it, not one that only ends there, as when text is selected.
let began_beside = false;
const isBeside = ({ target, clientX, clientY }) => {
  const { left, right, top, bottom } = $("viewer").getBoundingClientRect();
  return target === $("viewer") && (clientX < left || clientX > right || clientY < top || clientY > bottom);
};
$("viewer").onpointerdown = (event) => { began_beside = isBeside(event); };
$("viewer").onclick = (event) => { if (began_beside && isBeside(event)) $("viewer").close(); };
$("viewer").onclose = () => {
  $("large").replaceChildren();
  // The browser gives the focus back to the card it came from, which may be gone.
  const now = document.activeElement;
  if (now === document.body || $("viewer").contains(now)) (cardAt(state.shown) ?? $("gallery-title")).focus();
};
$("newer").onclick = () => turn(-1);
$("older").onclick = () => turn(1);
$("close").onclick = () => $("viewer").close();
$("reuse").onclick = () => {
  const item = state.shown;
  writeForm(item.settings);
  startFrom(item.sources, item.mask);
};
$("edit").onclick = () => {
  const item = state.shown;
  writeForm({});
  startFrom([new File([item.blob], "picture.png", { type: item.blob.type })]);
};
$("delete").onclick = () => {
  const next = neighbour(1) ?? neighbour(-1);
  deleteItems([state.shown]);
  next ? view(next) : $("viewer").close();
};
