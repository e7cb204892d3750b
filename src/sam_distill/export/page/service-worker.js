// Keeps the page's files, so that it works offline; and sends the two headers without which browsers allow one thread only.

const KEPT = "sam-distill";
const BEFORE = ["./", "index.html", "style.css", "app.js", "pixels.js"]; // what the page fetches before this is at work

self.addEventListener("install", (event) => {
  self.skipWaiting();
  event.waitUntil(caches.open(KEPT).then((kept) => kept.addAll(BEFORE)));
});
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  if (event.request.method === "GET" && new URL(event.request.url).origin === location.origin) {
    event.respondWith(answer(event.request));
  }
});

/** From the network, where there is one: an export may have been replaced. */
async function answer(request) {
  const kept = await caches.open(KEPT);
  try {
    const response = await fetch(request, { cache: "no-cache" });
    if (response.ok) await kept.put(request, response.clone());
    return isolated(response);
  } catch (error) {
    const response = await kept.match(request);
    if (!response) throw error;
    return isolated(response);
  }
}

function isolated(response) {
  const headers = new Headers(response.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}
