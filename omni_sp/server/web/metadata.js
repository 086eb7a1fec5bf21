const MOST_BYTES = 2 ** 18;  // of a text in a file: no prompt is longer

// What a picture was drawn with, as its file keeps it: text chunks of a PNG, the EXIF comment of a JPEG or a WebP.

// The settings of the form; null where the file keeps none, or cannot be read.
async function settingsIn(file) {
  if (file.size > state.info?.limits.body_bytes) return null;
  try {
    const bytes = new Uint8Array(await file.arrayBuffer());
    const found = bytes[0] === 0x89 ? textsOfPng(bytes) : commentIn(bytes);
    if (`${found.version ?? ""}`.startsWith("Omni-SP ")) return { ...found, n: found.num_outputs_per_prompt };
  } catch { /* a folder, a file that has gone, a comment that is none */ }
  return null;
}

function textsOfPng(bytes) {
  const view = new DataView(bytes.buffer);
  const found = {};
  for (let at = 8; at + 12 <= bytes.length;) {
    const length = view.getUint32(at);
    if (length <= MOST_BYTES && String.fromCharCode(...bytes.subarray(at + 4, at + 8)) === "iTXt") {
      const data = bytes.subarray(at + 8, at + 8 + length);
      const name = data.indexOf(0);
      const language = data.indexOf(0, name + 3);  // after two bytes about compression, which is not used here
      const text = data.indexOf(0, language + 1) + 1;
      if (name > 0 && language > 0 && text > 0)
        found[new TextDecoder().decode(data.subarray(0, name))] = new TextDecoder().decode(data.subarray(text));
    }
    at += 12 + length;
  }
  return found;
}

// The comment is one flat JSON object in ASCII, wherever the file has it.
function commentIn(bytes) {
  const text = new TextDecoder("latin1").decode(bytes);
  const start = text.indexOf("ASCII\0\0\0{") + 8;
  const comment = start < 8 ? null : /^\{(?:"(?:[^"\\]|\\.)*"|[^"{}])*\}/.exec(text.slice(start, start + MOST_BYTES));
  return comment ? JSON.parse(comment[0]) : {};
}

// A dropped picture that was drawn here fills the form. Where it is also one to start from, what is typed already stays.
async function fillFrom(file) {
  if (state.info?.takes_image && $("prompt").value.trim()) return;
  const settings = await settingsIn(file);
  if (!settings) {
    if (!state.info?.takes_image) showProblem(new Problem("This file has no settings of a picture that was drawn here."));
    return;
  }
  showProblem(null);
  writeForm(settings);
  say("The form has the settings of the picture.");
}

// LoRA adapters stand in the form, in the gallery and in files as "style=0.8, light=1", and in requests as names with scales.
const adaptersIn = (text) => [...`${text ?? ""}`.matchAll(/([\w-]+)=([^,\s]+)/g)].map(([, name, scale]) => ({ name, scale: Number(scale) }));
